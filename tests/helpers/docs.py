"""The examples of a page of docs/: each is what its readers see, and is run by a test.

A section of the page (`## Title`) is one example.  Its Python blocks whose first line is `# name.py` are files side by
side; a `text` block is what `python main.py` prints there, if there is one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.helpers.server import ROOT, environment, new_mark

#: Nobody waits as long as this.
PATIENCE = 50.0

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"# (\S+\.py)\n")


class Example(NamedTuple):
    title: str
    #: By name.
    files: dict[str, str]
    #: What `python main.py` prints; None if nothing is said of it.
    output: str | None

    def write(self, directory: Path) -> Path:
        """Its files, into a directory, which is returned."""
        for name, content in self.files.items():
            (directory / name).write_text(content)
        return directory

    def run(self, directory: Path, script: str = "main.py") -> str:
        """What the script prints, in the directory of its files; it must end in order."""
        self.write(directory)
        mark, _ = new_mark()
        done = subprocess.run(
            [sys.executable, script],
            cwd=directory,
            env=environment(mark, {"PYTHONPATH": str(ROOT)}, directory),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def examples(page: str) -> dict[str, Example]:
    """The sections of docs/`page` that have files, by title."""
    found: dict[str, Example] = {}
    for section in re.split(r"^## ", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        files: dict[str, str] = {}
        output = None
        for language, content in _BLOCK.findall(section):
            if language == "text":
                output = content
            elif language == "python" and (name := _NAME.match(content)):
                files[name[1]] = content
        if files:
            found[title] = Example(title, files, output)
    return found
