"""Modules of hooks: which can be used, and what is said of those that cannot."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clusterserve.core.events import EVENTS
from clusterserve.errors import SettingsError
from clusterserve.master.hooks import GUNICORNS, load_hooks, told_of_events
from clusterserve.settings import Settings

Write = Callable[[str], str]
NUMBERS = itertools.count()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str) -> str:
        name = f"some_hooks_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return name

    return write


def test_functions_are_found_by_their_names(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    source = "".join(f"def on_{event}({', '.join(names)}): return {event!r}\n" for event, names in EVENTS.items())
    name = write(source + "def helper(): pass\nonly = 1\n")
    listeners = load_hooks(name)
    assert {event: [function(*EVENTS[event]) for function in functions] for event, functions in listeners.items()} == {
        event: [event] for event in EVENTS
    }
    assert caplog.records == []


def test_they_may_be_anything_that_can_be_called(write: Write) -> None:
    name = write(
        "async def on_ready(): pass\n"
        "class Hook:\n    def __call__(self, *args): pass\n"
        "on_exit = Hook()\n"
        "on_stopped = dict\n"
        "on_reload = [].clear\n"
        "def on_scale(workers, before, extra=None): pass\n"
    )
    assert set(load_hooks(name)) == {"ready", "exit", "stopped", "reload", "scale"}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_thing", r"cannot be imported: No module named 'no_such_thing' \(.*, line 1\)"),
        ("\nx = 1 / 0", r"cannot be imported: ZeroDivisionError: division by zero \(.*some_hooks_\d+.py, line 2\)"),
        ("x = (", r"cannot be imported: SyntaxError: .* \(some_hooks_\d+.py, line 1\)"),
        ("raise SystemExit('no')", r"cannot be imported: SystemExit: no \(.*, line 1\)"),
        ("raise ValueError('a\\nb')", r"cannot be imported: ValueError: a b \(.*, line 1\)"),
        ("x = 1", r"have none of the functions on_fork, on_online, .*"),
    ],
)
def test_a_module_that_cannot_be_used(write: Write, source: str, reason: str) -> None:
    name = write(source)
    with pytest.raises(SettingsError, match=rf"^the hooks '{name}' {reason}$") as caught:
        load_hooks(name)
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(SettingsError, match=r"^the hooks 'no\.such' cannot be imported: No module named 'no'$"):
        load_hooks("no.such")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "def on_exit(server): pass",
            "must take (worker, code, signal); gunicorn's on_exit(server) is on_stopped() here",
        ),
        ("def on_reload(server): pass", "must take ()"),
        ("def on_fork(): pass", "must take (worker)"),
        ("on_ready = 3", "is no function"),
    ],
)
def test_a_function_that_cannot_be_called(write: Write, source: str, reason: str) -> None:
    name = write(source)
    with pytest.raises(SettingsError) as caught:
        load_hooks(name)
    assert str(caught.value).endswith(f" of {name!r} {reason}")


def test_what_is_not_called_is_told(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    name = write("def on_ready(): pass\ndef on_exitt(): pass\ndef when_ready(server): pass\npost_fork = 1\n")
    load_hooks(name)
    assert caplog.messages == [
        f"Hooks {name}: on_exitt is not called, there is no such event; did you mean 'on_exit'?",
        f"Hooks {name}: when_ready is gunicorn's and not called; use on_ready()",
    ]


def test_every_hook_of_gunicorns_is_in_the_table() -> None:
    """docs/hooks.md names each of them, and each of ours."""
    text = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text()
    for name in (*GUNICORNS, "on_reload", "on_exit"):
        assert f"| `{name}` |" in text
    for event, names in EVENTS.items():
        assert f"| `on_{event}({', '.join(names)})` |" in text


def test_without_hooks_there_is_no_thread() -> None:
    before = sys.modules.copy()
    with told_of_events(Settings.create(app="a:b", workers=1)) as emit:
        emit(None)  # type: ignore[arg-type]
    assert sys.modules.keys() == before.keys()
