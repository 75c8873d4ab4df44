"""Our `dataclass` and the standard library's give the same class, as far as anybody who uses it can tell."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from dataclasses import field
from typing import Any, ClassVar

import pytest

from clusterserve.core import dataclass as ours

OURS: Any = vars(ours)["dataclass"]
BOTH = pytest.mark.parametrize("dataclass", [dataclasses.dataclass, OURS], ids=["standard", "ours"])
FROZEN = pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "mutable"])


@OURS(frozen=True)
class Point:
    """For pickle, which wants a name."""

    x: int
    y: list[int] = field(default_factory=list)


def made(dataclass: Callable[..., Any], **options: bool) -> Any:
    @dataclass(**options)
    class Made:
        """Something of everything that is used."""

        KIND: ClassVar = "made"
        one: int
        two: str = "2"
        three: list[int] = field(default_factory=list)
        secret: str = field(default="s", repr=False)
        loose: float = field(default=0.0, compare=False)

    return Made


@BOTH
@FROZEN
def test_what_it_makes(dataclass: Any, frozen: bool) -> None:
    kind = made(dataclass, frozen=frozen)
    first = kind(1, secret="x")
    assert (first.one, first.two, first.three, first.secret, first.loose) == (1, "2", [], "x", 0.0)
    assert first.three is not kind(1).three
    assert repr(first) == "made.<locals>.Made(one=1, two='2', three=[], loose=0.0)"
    assert first == kind(1, "2", [], "x", 9.0)
    assert first != kind(1)
    assert first != (1, "2", [], "x", 0.0)
    assert first.__eq__(object()) is NotImplemented
    assert [each.name for each in dataclasses.fields(first)] == ["one", "two", "three", "secret", "loose"]
    assert dataclasses.asdict(first) == {"one": 1, "two": "2", "three": [], "secret": "x", "loose": 0.0}
    assert dataclasses.astuple(first) == (1, "2", [], "x", 0.0)
    changed = dataclasses.replace(first, two="zwei", three=[1])
    assert (changed.two, changed.three, changed.secret) == ("zwei", [1], "x")
    match first:
        case kind(one, two):
            assert (one, two) == (1, "2")
    assert copy.deepcopy(first) == first
    for wrong in ((), (1, "2", [], "s", 0.0, "too much")):
        with pytest.raises(TypeError, match=r"Made.__init__\(\) "):
            kind(*wrong)
    with pytest.raises(TypeError, match="unexpected keyword argument 'four'"):
        kind(1, four=4)


@BOTH
def test_only_what_is_frozen_has_a_hash_and_cannot_be_changed(dataclass: Any) -> None:
    @dataclass(frozen=True)
    class Frozen:
        """Frozen."""

        one: int
        two: int = field(default=2, compare=False)

    assert hash(Frozen(1)) == hash(Frozen(1, 3)) == hash(copy.copy(Frozen(1)))
    assert {Frozen(1), Frozen(1)} == {Frozen(1)}
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'one'"):
        Frozen(1).one = 2
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete field 'one'"):
        del Frozen(1).one
    mutable = made(dataclass)(1)
    mutable.one = 2
    assert mutable == made_like(mutable)
    with pytest.raises(TypeError, match="unhashable"):
        hash(mutable)


def made_like(other: Any) -> Any:
    return type(other)(other.one, other.two, other.three, other.secret, other.loose)


@BOTH
@FROZEN
def test_without_fields(dataclass: Any, frozen: bool) -> None:
    @dataclass(frozen=frozen)
    class Empty:
        """Nothing in it."""

    assert Empty() == Empty()
    assert repr(Empty()).endswith("Empty()")
    assert not frozen or hash(Empty()) == hash(Empty())


@BOTH
def test_keywords_inheritance_and_what_a_class_says_itself(dataclass: Any) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Base:
        """Its fields come first, and are for its heirs' keywords."""

        one: int = 1

        def __repr__(self) -> str:
            return "its own"

    @dataclass(frozen=True, kw_only=True)
    class Heir(Base):
        """Checks."""

        two: int

        def __post_init__(self) -> None:
            if self.two < 0:
                raise ValueError("less than nothing")

    assert (Heir(two=2).one, repr(Base())) == (1, "its own")
    assert Heir(one=1, two=2) == Heir(two=2) != Base()
    assert repr(Heir(two=2)).endswith("Heir(one=1, two=2)")
    assert str(inspect.signature(Base)).startswith("(*, one")
    with pytest.raises(TypeError, match="positional"):
        Heir(1)
    with pytest.raises(ValueError, match="less than nothing"):
        Heir(two=-1)


def test_it_can_be_pickled() -> None:
    there = pickle.loads(pickle.dumps(Point(1, [2])))
    assert (there, type(there)) == (Point(1, [2]), Point)
