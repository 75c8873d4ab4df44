"""`python -m benchmarks.proxied PORT WORKERS APP UVICORN_OPTION...`: HAProxy in front of so many single uvicorns.

Each uvicorn gets one request at a time (`maxconn 1`), the rest waits in HAProxy's one queue: the proxy's way to what
clusterserve does without a proxy.  Ends on SIGTERM, and with the first of its processes that ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

STOP_SECONDS = 8.0

CONFIGURATION = """\
defaults
    mode http
    timeout connect 5s
    timeout client 300s
    timeout server 60s
    timeout queue 60s
    timeout http-keep-alive 300s
    option redispatch
frontend clients
    bind 127.0.0.1:{port}
    default_backend workers
backend workers
    balance leastconn
{servers}
"""


def configuration(port: int, sockets: list[Path]) -> str:
    servers = [f"    server worker{number} unix@{path} maxconn 1" for number, path in enumerate(sockets)]
    return CONFIGURATION.format(port=port, servers="\n".join(servers))


def main() -> int:
    port, workers, app, *options = sys.argv[1:]
    signal.signal(signal.SIGTERM, _leave)
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as directory:
        sockets = [Path(directory, f"{number}.sock") for number in range(int(workers))]
        file = Path(directory, "haproxy.cfg")
        file.write_text(configuration(int(port), sockets))
        try:
            for path in sockets:
                command = [sys.executable, "-m", "uvicorn", app, "--uds", str(path), *options]
                children.append(subprocess.Popen(command))
            children.append(subprocess.Popen(["haproxy", "-db", "-f", str(file)]))
            # Whichever it is, and without reaping it: Popen does that below.
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            return 1
        finally:
            for child in children:
                child.terminate()
            for child in children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(STOP_SECONDS)


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
