"""The direction of imports is the architecture: cli → master → channel → core, worker → channel → core.

Read from the source, so that an import inside a function or for type checkers only counts as well.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "clusterserve"

#: The parts, and which parts each may import.  Whatever else lies in the package is "base": settings, errors, helpers.
PARTS = {
    "core": {"core", "errors"},
    "channel": {"channel", "core", "errors"},
    "master": {"master", "channel", "core", "base", "errors"},
    "worker": {"worker", "channel", "core", "base", "errors"},
    "cli": {"master", "core", "base", "errors", "package"},
    "__main__": {"cli"},
    "package": {"master", "core", "base", "errors"},
    "base": {"base", "core", "errors"},
    "errors": set(),
}

#: What makes a decision depend on something else than its arguments, or takes part in the world.
IMPURE = {
    "asyncio", "concurrent", "contextvars", "ctypes", "fcntl", "importlib", "io", "logging", "mmap", "multiprocessing",
    "os", "pathlib", "random", "resource", "secrets", "select", "selectors", "shutil", "signal", "socket",
    "socketserver", "ssl", "subprocess", "sys", "tempfile", "threading", "time", "uuid",
}  # fmt: skip

#: Two files touch uvicorn's internals; what the others may do with it, and whether only within a function.
UVICORN = {
    "clusterserve.worker.asgi": False, "clusterserve.worker.protocols": False, "clusterserve.logs": False,
    "clusterserve.cli": True, "clusterserve.master.check": False,
}  # fmt: skip


class Import(NamedTuple):
    #: "clusterserve.core.records", "os.path" …
    module: str
    #: It stands in a function.
    lazy: bool
    line: int


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(module: str, source: str) -> tuple[Import, ...]:
    """What the module called `module` imports."""
    return tuple(_imports(module, ast.parse(source)))


def _imports(module: str, tree: ast.Module) -> Iterator[Import]:
    lazy = {
        inner
        for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }  # fmt: skip
    is_package = module not in SOURCES or SOURCES[module].name == "__init__.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node in lazy, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - is_package
                package = module.split(".")[: -up or None]
                base = ".".join([*package, base]) if base else ".".join(package)
            for alias in node.names:
                # `from .. import errors` imports a module, `from ..errors import ClusterError` a name of one.
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in SOURCES else base, node in lazy, node.lineno)


def part(module: str) -> str:
    """The part of the package that `module` belongs to."""
    if module == "clusterserve":
        return "package"
    first = module.split(".")[1]
    return first if first in PARTS else "base"


def faults(module: str, source: str) -> list[str]:
    """What is wrong with the imports of the module called `module`."""
    found = []
    for target, lazy, line in imports(module, source):
        top = target.split(".")[0]
        here = part(module)
        wrong = ""
        if top == "clusterserve":
            if part(target) not in PARTS[here]:
                wrong = f"{here} must not import {part(target)}"
        elif here == "core" and (top in IMPURE or top not in sys.stdlib_module_names):
            wrong = "core is pure"
        elif here == "channel" and top not in sys.stdlib_module_names:
            wrong = "the channels need nothing but the standard library"
        elif top == "uvicorn" and (module not in UVICORN or (UVICORN[module] and not lazy)):
            wrong = "only worker/asgi.py and protocols.py touch uvicorn"
        if wrong:
            found.append(f"{module}:{line} imports {target}: {wrong}")
    return found


def test_there_is_something_to_read() -> None:
    assert {"clusterserve", "clusterserve.core.records", "clusterserve.core", "clusterserve.errors"} <= SOURCES.keys()


@pytest.mark.parametrize("module", SOURCES)
def test_every_module_imports_only_what_its_part_may(module: str) -> None:
    assert faults(module, SOURCES[module].read_text()) == []


def test_every_import_of_ours_is_of_a_module_that_exists() -> None:
    """Else a rule above could be passed by with a name it does not know."""
    known = {
        target
        for module, path in SOURCES.items()
        for target, _, _ in imports(module, path.read_text())
        if target.startswith("clusterserve")
    }
    assert known <= SOURCES.keys()


@pytest.mark.parametrize(
    ("module", "source", "why"),
    [
        ("clusterserve.core.records", "import os", "core is pure"),
        ("clusterserve.core.records", "def f():\n    from time import monotonic", "core is pure"),
        ("clusterserve.core.records", "import os.path", "core is pure"),
        ("clusterserve.core.records", "import uvloop", "core is pure"),
        ("clusterserve.core.records", "from ..settings import Settings", "core must not import base"),
        ("clusterserve.core", "from ..settings import Settings", "core must not import base"),
        ("clusterserve.core.records", "from .. import __version__", "core must not import package"),
        ("clusterserve.channel", "from ..settings import Settings", "channel must not import base"),
        ("clusterserve.channel", "import uvloop", "nothing but the standard library"),
        ("clusterserve.master", "from ..worker import x", "master must not import worker"),
        ("clusterserve.master", "if TYPE_CHECKING:\n    import clusterserve.worker", "master must not import worker"),
        ("clusterserve.master", "from clusterserve import worker", "master must not import worker"),
        ("clusterserve.worker", "from ..master import x", "worker must not import master"),
        ("clusterserve.worker", "from ..cli import main", "worker must not import cli"),
        ("clusterserve.settings", "from .channel import x", "base must not import channel"),
        ("clusterserve.binds", "from clusterserve.master import x", "base must not import master"),
        ("clusterserve.cpus", "def f():\n    from .worker import x", "base must not import worker"),
        ("clusterserve.errors", "from .settings import Settings", "errors must not import base"),
        (
            "clusterserve.master",
            "from uvicorn.config import LOGGING_CONFIG",
            "only worker/asgi.py and protocols.py touch uvicorn",
        ),
        ("clusterserve.worker", "import uvicorn", "only worker/asgi.py and protocols.py touch uvicorn"),
        ("clusterserve.cli", "import uvicorn", "only worker/asgi.py and protocols.py touch uvicorn"),
    ],
)
def test_what_must_not_be_is_found(module: str, source: str, why: str) -> None:
    (fault,) = faults(module, source)
    assert fault.endswith(why)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("clusterserve.core.records", "from ..errors import ProtocolError\nfrom . import messages\nimport struct"),
        ("clusterserve.core.records", "from .. import errors"),
        ("clusterserve.channel", "import asyncio, os, socket\nfrom ..core.records import Kind"),
        ("clusterserve.master", "from ..channel import x\nfrom ..settings import Settings\nimport uvloop"),
        ("clusterserve.worker.asgi", "import uvicorn\nfrom uvicorn.config import LOGGING_CONFIG"),
        ("clusterserve.cli", "def version():\n    import uvicorn"),
    ],
)
def test_what_may_be_is_not(module: str, source: str) -> None:
    assert faults(module, source) == []
