"""The program that a worker runs, found and compiled before it is run: what cannot be is the cluster's failure."""

from __future__ import annotations

import importlib.util
import io
import os
import runpy
import sys
import traceback
from types import CodeType, ModuleType

from ..errors import BootError


class MainModule:
    """`what` is a script's path, a directory or archive with a `__main__.py`, or "-m package.module"."""

    def __init__(self, what: str, args: list[str]) -> None:
        """Raises `BootError` if there is no such program, or it is none."""
        self._args = args
        self._module = ""
        self._path = ""
        self._code: CodeType | None = None
        first, _, rest = what.partition(" ")
        if first == "-m" and rest.strip():
            self._module = rest.strip()
            sys.path.insert(0, os.getcwd())
            self._find()
        else:
            self._path = what
            self._load()

    def _find(self) -> None:
        try:
            found = importlib.util.find_spec(self._module) is not None
        except ModuleNotFoundError:
            found = False
        except Exception:  # noqa: BLE001 - of the packages around it, which will tell again when it is run
            return
        if not found:
            raise BootError(f"there is no module {self._module!r}")

    def _load(self) -> None:
        if os.path.isdir(self._path) or self._path.endswith((".zip", ".pyz")):
            # Found by its `__main__`; runpy knows how, and puts it into sys.path.
            return
        try:
            with io.open_code(os.path.abspath(self._path)) as file:
                self._code = compile(file.read(), self._path, "exec", dont_inherit=True)
        except OSError as exc:
            raise BootError(f"the program {self._path!r} cannot be read: {exc.strerror}") from None
        except (SyntaxError, ValueError) as exc:
            text = "".join(traceback.format_exception_only(type(exc), exc))
            raise BootError(f"{self._path!r} is no Python program", text) from None
        # As the interpreter does for a script, links followed.
        sys.path.insert(0, os.path.dirname(os.path.realpath(self._path)))

    def run(self) -> int:
        """Run it as `__main__`; returns 1 if it raised, which it has then told on stderr."""
        sys.argv[:] = [self._path or "-m", *self._args]
        try:
            if self._code is not None:
                # Not by runpy: the module must be there as long as the process, for threads, pickle and atexit.
                module = ModuleType("__main__")
                module.__dict__.update(__file__=self._path, __cached__=None, __builtins__=__builtins__)
                sys.modules["__main__"] = module
                exec(self._code, module.__dict__)
            elif self._module:
                sys.modules["__main__"] = ModuleType("__main__")
                runpy._run_module_as_main(self._module)  # type: ignore[attr-defined]
            else:
                runpy.run_path(self._path, run_name="__main__")
        except Exception as exc:  # noqa: BLE001 - the program's own, told as the interpreter tells it
            trace = exc.__traceback__
            while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__):
                trace = trace.tb_next
            exc.__traceback__ = trace
            sys.excepthook(type(exc), exc, trace)
            return 1
        return 0
