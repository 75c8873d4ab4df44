"""`dataclass`, as the standard library's, for a fraction of what that costs when a module is imported.

The standard one writes and compiles six functions for each class: measured with CPython 3.11, a third of what a master
imports is that (40 of 125 ms), and every worker has half of it again.  Here only `__init__` is compiled; the others are
the same functions for all classes.  For `field`, `fields`, `replace`, `asdict` and type checkers these are dataclasses
as any other.  What is not in its signature is not supported; fields are all arguments of `__init__`.
"""

from __future__ import annotations

import dataclasses
from operator import attrgetter
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(cls=None, /, *, frozen=False, kw_only=False):
        """Add to a class what `dataclasses.dataclass` with these arguments would; what it defines itself stays."""
        if cls is None:
            return lambda cls: _processed(cls, frozen, kw_only)
        return _processed(cls, frozen, kw_only)


def _processed(cls: Any, frozen: bool, kw_only: bool) -> Any:
    cls = dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=kw_only)(cls)
    fields = dataclasses.fields(cls)
    compared = [field.name for field in fields if field.compare]
    methods = {
        "__init__": _initializer(cls, fields, frozen),
        "__repr__": _repr,
        "__eq__": _eq,
        "__hash__": _hash if frozen else None,
    }
    if frozen:
        methods |= {"__setattr__": _setattr, "__delattr__": _delattr}
    for name, method in methods.items():
        # A class that defines __eq__ has a __hash__ of None, which is not its own word.
        if cls.__dict__.get(name) is None:
            setattr(cls, name, method)
    #: The values that are compared: one, or a tuple of several.
    cls.__values__ = staticmethod(attrgetter(*compared) if compared else _nothing)
    return cls


def _initializer(cls: type, fields: tuple[dataclasses.Field[Any], ...], frozen: bool) -> Any:
    names: dict[str, Any] = {"_set": object.__setattr__, "_MISSING": dataclasses.MISSING}
    positional = ["self"]
    keywords: list[str] = []
    body = []
    for field in fields:
        name, value = field.name, field.name
        parameter = name
        if field.default is not dataclasses.MISSING:
            names[f"_default_{name}"] = field.default
            parameter = f"{name}=_default_{name}"
        elif field.default_factory is not dataclasses.MISSING:
            names[f"_factory_{name}"] = field.default_factory
            parameter = f"{name}=_MISSING"
            value = f"_factory_{name}() if {name} is _MISSING else {name}"
        (keywords if field.kw_only else positional).append(parameter)
        body.append(f"_set(self, {name!r}, {value})" if frozen else f"self.{name} = {value}")
    if hasattr(cls, "__post_init__"):
        body.append("self.__post_init__()")
    parameters = ", ".join([*positional, *(["*", *keywords] if keywords else [])])
    exec(f"def __init__({parameters}):\n " + "\n ".join(body or ["pass"]), names)
    initializer = names["__init__"]
    initializer.__qualname__ = f"{cls.__qualname__}.__init__"
    return initializer


def _nothing(self: object) -> tuple[()]:
    return ()


def _repr(self: Any) -> str:
    shown = (f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self) if field.repr)
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _eq(self: Any, other: Any) -> Any:
    if other.__class__ is self.__class__:
        return self.__values__(self) == self.__values__(other)
    return NotImplemented


def _hash(self: Any) -> int:
    return hash(self.__values__(self))


def _setattr(self: object, name: str, value: object) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _delattr(self: object, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
