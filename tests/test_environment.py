"""Variables of a configuration are taken back before it is read again, and nobody else's are."""

from __future__ import annotations

import os

import pytest

from clusterserve.environment import Environment


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.update(A="theirs", B="theirs")


def shown() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in "ABC"}


def test_what_was_set_is_taken_back() -> None:
    environment = Environment()
    with environment.anew():
        os.environ.update(B="ours", C="ours")
    assert environment.changed == ("B", "C")
    with environment.anew():
        assert shown() == {"A": "theirs", "B": "theirs"}
        os.environ["C"] = "ours"
    assert shown() == {"A": "theirs", "B": "theirs", "C": "ours"}
    assert environment.changed == ("B",)
    with environment.anew():
        pass
    assert shown() == {"A": "theirs", "B": "theirs"}


def test_what_somebody_else_changed_is_theirs() -> None:
    environment = Environment()
    with environment.anew():
        os.environ.update(B="ours", C="ours")
    os.environ["B"] = "somebody's"
    del os.environ["C"]
    with environment.anew():
        assert shown() == {"A": "theirs", "B": "somebody's"}


def test_what_was_ours_can_be_had_again() -> None:
    environment = Environment()
    with environment.anew():
        os.environ.update(A="ours", B="ours")
    again = environment.memory()
    with environment.anew():
        os.environ.update(B="new", C="new")
    with environment.anew():
        os.environ.update(A="newer", C="newer", D="newer")
    del os.environ["D"]
    assert shown() == {"A": "newer", "B": "theirs", "C": "newer"}
    again()
    assert shown() == {"A": "ours", "B": "ours"}
    # What somebody else has changed since is theirs.
    with environment.anew():
        assert shown() == {"A": "theirs", "B": "theirs"}
        os.environ["B"] = "new"
    os.environ["B"] = "somebody's"
    again()
    assert shown() == {"A": "ours", "B": "somebody's"}


def test_a_block_that_fails_changes_nothing() -> None:
    environment = Environment()
    with environment.anew():
        os.environ["C"] = "ours"
    before = dict(os.environ)

    def fail() -> None:
        os.environ.update(A="new", D="new")
        raise ValueError("no good")

    with pytest.raises(ValueError, match="no good"), environment.anew():
        fail()
    assert dict(os.environ) == before
    # It is still known whose C is.
    with environment.anew():
        assert shown() == {"A": "theirs", "B": "theirs"}
