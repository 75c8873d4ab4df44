"""`python -m tests.stress N [pytest arguments]`: the suite N times in a row, with every core kept busy meanwhile.

`--races M` in front: only the tests that carry the mark `races`, each M times in a row, in every one of the N runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys


def main(times: int, races: int, arguments: list[str]) -> int:
    """Run it; returns the first exit code that is not 0."""
    environment = dict(os.environ)
    if races:
        environment["CLUSTERSERVE_TEST_RACES"] = str(races)
        arguments = ["-m", "races", "tests/conformance", *arguments]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        for turn in range(1, times + 1):
            print(f"--- run {turn} of {times}", flush=True)
            command = [sys.executable, "-m", "pytest", "-q", *arguments]
            code = subprocess.run(command, env=environment, check=False).returncode
            if code:
                return code
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--races", type=int, default=0)
    parser.add_argument("times", type=int)
    known, rest = parser.parse_known_args()
    sys.exit(main(known.times, known.races, rest))
