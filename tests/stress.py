"""`python -m tests.stress N [pytest arguments]`: the suite N times in a row, with every core kept busy meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys


def main(times: int, arguments: list[str]) -> int:
    """Run it; returns the first exit code that is not 0."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        for turn in range(1, times + 1):
            print(f"--- run {turn} of {times}", flush=True)
            code = subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], check=False).returncode
            if code:
                return code
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
