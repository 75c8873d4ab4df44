"""Sockets that were passed: which they are, what they are called, and when they are where to listen."""

from __future__ import annotations

import os

import pytest

from clusterserve.activation import addresses, passed
from clusterserve.errors import SettingsError
from clusterserve.settings import Settings


@pytest.fixture(autouse=True)
def nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "PORT"):
        monkeypatch.delenv(name, raising=False)


def give(monkeypatch: pytest.MonkeyPatch, count: object, names: str | None = None, pid: object = None) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() if pid is None else pid))
    monkeypatch.setenv("LISTEN_FDS", str(count))
    if names is not None:
        monkeypatch.setenv("LISTEN_FDNAMES", names)


def binds(**values: object) -> list[str]:
    return [str(bind) for bind in Settings.create(app="a:b", workers=1, **values).binds]


def test_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert passed() == {}
    give(monkeypatch, 2, "web:admin")
    assert passed() == {3: "web", 4: "admin"}


@pytest.mark.parametrize("names", [None, "", "web", "web:", ":"])
def test_a_name_that_is_missing(monkeypatch: pytest.MonkeyPatch, names: str | None) -> None:
    give(monkeypatch, 2, names)
    assert passed()[4] == "unknown"


@pytest.mark.parametrize(("count", "pid"), [(1, 1), ("", None), ("x", None), (-1, None), (1, "x"), (1, ""), (0, None)])
def test_what_is_not_for_us(monkeypatch: pytest.MonkeyPatch, count: object, pid: object) -> None:
    """A shell in between, for one, has another process id."""
    give(monkeypatch, count, "web", pid)
    assert passed() == {}
    assert binds() == ["127.0.0.1:8000"]


def test_without_an_address_all_of_them_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "80")
    give(monkeypatch, 2)
    assert binds() == ["fd://3", "fd://4"]
    assert binds(bind=":1") == ["0.0.0.0:1"]
    assert binds(port=1) == ["127.0.0.1:1"]


def test_one_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, 3, "web:admin:web")
    assert binds(bind="fd://admin") == ["fd://4"]
    assert binds(bind=["fd://web", ":1"]) == ["fd://3", "fd://5", "0.0.0.0:1"]
    assert addresses("unix:fd://web") == ["unix:fd://web"]


@pytest.mark.parametrize(
    ("count", "reason"),
    [
        (0, "no sockets were passed (LISTEN_FDNAMES)"),
        (2, "the sockets that were passed are called web, admin (LISTEN_FDNAMES); did you mean 'web'?"),
    ],
)
def test_a_name_that_none_has(monkeypatch: pytest.MonkeyPatch, count: int, reason: str) -> None:
    give(monkeypatch, count, "web:admin")
    with pytest.raises(SettingsError) as caught:
        binds(bind="fd://wbe")
    assert str(caught.value) == f"bind='fd://wbe': {reason}"
