"""What all tests share: the project's root on the path, the mark for tests that need a Debian tool, and `serve`."""

from __future__ import annotations

import compileall
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
# `examples` and `tests.helpers` are found here whatever directory the tests are started from.
sys.path.insert(0, str(ROOT))
# pytest keeps what it makes of each test module, wherever that can be written: two thirds of the collecting, and every
# process of xdist collects.
sys.dont_write_bytecode = False
pytest.register_assert_rewrite("tests.helpers")

from tests.helpers import everybody  # noqa: E402
from tests.helpers.server import Serve, serving  # noqa: E402

# How long one example takes says something about the machine only.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

_NOT_RUN = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "needs_tool(name): needs a program of .ci/packages; without it the test is listed as not run, "
        "and fails where CI=true",
    )
    config.addinivalue_line(
        "markers",
        "needs_module(name): needs a package of the extra `test`; else as with a missing program",
    )
    config.addinivalue_line("markers", "needs_root: needs root, and a Python that everybody may run; not run without")
    config.stash[_NOT_RUN] = {}
    if not hasattr(config, "workerinput"):
        _compile()


def _compile() -> None:
    """Compile what the processes under test import: once, and not each of thousands anew.

    Where PYTHONDONTWRITEBYTECODE is set, as in many containers, nobody else does, and compiling is 40 % of what a
    master needs to start, and 20 % of a worker.  A checkout that must not be written to stays as it is.
    """
    for part in ("clusterserve", "examples", "benchmarks", "tests"):
        # pytest compiles the tests themselves, its own way.
        compileall.compile_dir(ROOT / part, quiet=2, rx=re.compile(r"/test_\w+\.py$"))


def _missing_tool(item: pytest.Item) -> str | None:
    for mark in item.iter_markers("needs_tool"):
        for tool in mark.args:
            if shutil.which(tool) is None:
                return str(tool)
    for mark in item.iter_markers("needs_module"):
        if importlib.util.find_spec(mark.args[0]) is None:
            return str(mark.args[0])
    return None


# Last: what -k and -m have left.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("CI") == "true":
        _leave_out(config, items, _rootless(items))
        return
    missing = {item.nodeid: tool for item in items if (tool := _missing_tool(item)) is not None}
    missing.update(_rootless(items))
    _leave_out(config, items, missing)


def _leave_out(config: pytest.Config, items: list[pytest.Item], missing: dict[str, str]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in missing])
    items[:] = [item for item in items if item.nodeid not in missing]
    config.stash[_NOT_RUN].update(missing)


def _rootless(items: list[pytest.Item]) -> dict[str, str]:
    """The tests that need root: CI cannot install that, so it lists them as well."""
    marked = [item.nodeid for item in items if item.get_closest_marker("needs_root")]
    if not marked or everybody.python() is not None:
        return {}
    return dict.fromkeys(marked, "root, and a Python that every user may run")


def pytest_runtest_setup(item: pytest.Item) -> None:
    tool = _missing_tool(item)
    if tool is not None:
        pytest.fail(
            f"{tool} is not installed, and with CI=true everything must be (see .ci/packages)",
            pytrace=False,
        )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for nodeid, tool in config.stash[_NOT_RUN].items():
        terminalreporter.write_line(f"NOT RUN {nodeid} - needs {tool}", yellow=True)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers for one test; see `Server` for what it takes and what it proves at the end."""
    with serving() as factory:
        yield factory


@pytest.fixture(scope="module")
def serve_module() -> Iterator[Serve]:
    """Starts servers that all tests of a module share."""
    with serving() as factory:
        yield factory
