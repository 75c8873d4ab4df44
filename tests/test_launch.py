"""How workers are launched, checked."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from clusterserve.errors import SettingsError
from clusterserve.launch import LAUNCH_CHECKS, LAUNCH_NAMES, Launch, main_script
from clusterserve.settings import Settings


def checked(name: str, value: object) -> Any:
    return LAUNCH_CHECKS[name](name, value)


def test_every_field_has_a_check() -> None:
    assert set(LAUNCH_CHECKS) == set(LAUNCH_NAMES)
    assert hash(Launch()) == hash(Launch())


@pytest.mark.parametrize(
    ("name", "value", "result"),
    [
        ("exec", "script.py", "script.py"),
        ("exec", Path("script.py"), "script.py"),
        ("args", ["one", "two"], ("one", "two")),
        ("cwd", "/nonexistent", "/nonexistent"),
        ("cwd", None, None),
        ("env", {"A": "b"}, (("A", "b"),)),
        ("env", (("A", "b"),), (("A", "b"),)),
        ("uid", "root", 0),
        ("uid", "0", 0),
        ("gid", "root", 0),
        ("gid", 5, 5),
        ("silent", True, True),
        ("stdio", None, ()),
        ("stdio", ["pipe", "ignore", "inherit", "ipc", 2], ("pipe", "ignore", "inherit", "ipc", 2)),
        ("stdio", ["pipe", "pipe", sys.__stderr__, "ipc"], ("pipe", "pipe", 2, "ipc")),
        ("interpreter", ["-X", "dev"], ("-X", "dev")),
        ("serialization", "pickle", "pickle"),
    ],
)
def test_what_may_be_given(name: str, value: object, result: object) -> None:
    assert checked(name, value) == result


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("exec", 5, "must be a text"),
        ("args", "one two", "must be a list of texts"),
        ("args", [5], "must be a text"),
        ("args", 5, "must be a list of texts"),
        ("cwd", "a\0b", "NUL"),
        ("env", "A=b", "must be a mapping"),
        ("env", {"A": 5}, "must be a text"),
        ("env", {"A": "\ud800"}, "no process can be given"),
        ("env", {"\ud800": "b"}, "no process can be given"),
        ("args", ["\ud800"], "no process can be given"),
        ("cwd", "\ud800", "no process can be given"),
        ("env", {"": "b"}, "is not the name of a variable"),
        ("env", {"A=": "b"}, "is not the name of a variable"),
        ("uid", "nobody-of-this-name", "there is no such user"),
        ("gid", "nobody-of-this-name", "there is no such group"),
        ("uid", -1, "must be a whole number"),
        ("stdio", "pipe", "must be a list"),
        ("stdio", ["pipe", "pipe", "pipe"], "must have one entry 'ipc'"),
        ("stdio", ["ipc", "pipe", "pipe"], "comes after the three standard streams"),
        ("stdio", ["pipe", "pipe", "peip", "ipc"], "did you mean 'pipe'"),
        ("stdio", ["pipe", "pipe", -1, "ipc"], "must be a whole number"),
        ("serialization", "xml", "must be one of json, pickle"),
    ],
)
def test_what_may_not(name: str, value: object, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        checked(name, value)


def test_the_main_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", "a", "b"])
    assert main_script() == {"exec": os.path.join(os.getcwd(), "script.py"), "args": ("a", "b")}


def test_programs_have_no_address_by_default_and_manual_clusters_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "80")
    monkeypatch.setenv("WEB_CONCURRENCY", "7")
    made = Settings.create(exec="script.py")
    assert (made.app, made.binds, made.workers) == ("", (), 7)
    assert len(Settings.create(exec="script.py", bind=":0").binds) == 1
    assert Settings.create(exec="script.py", respawn=False).workers == 0
    assert Settings.create(exec="script.py", respawn=False, workers=2).workers == 2
    assert Settings.create(app="a:b", respawn=False).workers == 0
    with pytest.raises(SettingsError, match="exclude each other"):
        Settings.create(app="a:b", exec="script.py")


def test_a_launch_does_not_travel_with_the_settings() -> None:
    made = Settings.create(exec="script.py", args=["x"], workers=1)
    assert set(made.to_json()).isdisjoint(LAUNCH_NAMES)
    assert dataclasses.replace(made, exec="", args=()) == Settings.from_json(made.to_json())
