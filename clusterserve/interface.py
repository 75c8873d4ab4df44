"""Which interface an application speaks: asgi3, asgi2 or wsgi, told from how it can be called.

Looks, and calls nothing but factories.  What can be called in more than one way is for its author to tell: serving it
wrongly would fail with every request, and not at the start.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, Final, Literal

from clusterserve.errors import BootError

Interface = Literal["asgi3", "asgi2", "wsgi"]

#: What an application of asgi3 is called with.
_ASGI3: Final = ("scope", "receive", "send")

logger = logging.getLogger("uvicorn.error")


def built(app: Any, *, factory: bool) -> Any:
    """What `app` makes if it is a factory, else `app`.  As uvicorn: whatever can be called without arguments is one.

    Raises what the call raises, except for a TypeError of what is not said to be a factory.
    """
    try:
        made = app()
    except TypeError:
        if factory:
            raise
        return app
    if not factory:
        logger.warning(
            "ASGI app factory detected. Using it, but please consider setting the --factory flag explicitly."
        )
    return made


def interface_of(app: Any, name: str) -> Interface:
    """The interface of the application called `name`.  Raises `BootError` if it could be another one just as well."""
    if not callable(app):
        raise BootError(f"{name!r} is no application: an object of type {type(app).__name__} cannot be called")
    if _is_async(app):
        return "asgi3"
    try:
        signature = inspect.signature(app)
    except ValueError:
        raise _doubtful(name, "it does not tell how it is called") from None
    ways = [count for count in (1, 2, 3) if _takes(signature, count)]
    names = tuple(signature.parameters)[:3]
    if ways == [1]:
        return "asgi2"
    if 3 in ways and _gives_an_awaitable(app, signature, names):
        return "asgi3"
    if ways == [2] or (2 in ways and names[:1] in (("environ",), ("env",))):
        return "wsgi"
    if not ways:
        raise BootError(f"{name!r} is no application: it is called with {_shown(signature)}, which no interface is")
    raise _doubtful(name, f"it is called with {_shown(signature)}")


def _is_async(app: Any) -> bool:
    """Whether calling it gives a coroutine: a function, a method, an instance, or a partial of one."""
    while isinstance(app, functools.partial):
        app = app.func
    if inspect.isclass(app):
        return False
    call: Callable[..., Any] = app if inspect.isroutine(app) else type(app).__call__
    # asgiref marks functions in this way where `inspect` cannot.
    return inspect.iscoroutinefunction(call) or getattr(call, "_is_coroutine", None) is not None


def _gives_an_awaitable(app: Any, signature: inspect.Signature, names: tuple[str, ...]) -> bool:
    """Of what takes three arguments and is no coroutine function: as many a middleware is, a function in front of one.

    No other interface has three.  But whoever mistook the interface, and has not named them so, should hear of it.
    """
    if inspect.isclass(app):
        return hasattr(app, "__await__")
    returns = str(signature.return_annotation)
    return names == _ASGI3 or "Awaitable" in returns or "Coroutine" in returns


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*(None,) * count)
    except TypeError:
        return False
    return True


def _shown(signature: inspect.Signature) -> str:
    empty = inspect.Signature.empty
    bare = [parameter.replace(annotation=empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=empty))


def _doubtful(name: str, why: str) -> BootError:
    return BootError(f"cannot tell which interface {name!r} speaks: {why}; say --interface asgi3, asgi2 or wsgi")
