"""Whether the application answers: exit code 0 or 1, as Docker wants it, and the reason in one line."""

from __future__ import annotations

import sys
import urllib.request


def main(url: str) -> int:
    # Without the proxy that the variables of a container may name: it is for going out.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as response:
            print(response.status)
            return 0
    except OSError as error:
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
