"""What `clusterserve` and `python -m clusterserve` run."""

from __future__ import annotations

import os
from typing import NoReturn


def main() -> NoReturn:
    """The command line; a Ctrl-C in the moments before anybody listens to signals needs no traceback."""
    try:
        # Most of these moments.
        from clusterserve.cli import main

        main()
    except KeyboardInterrupt:
        os._exit(130)


if __name__ == "__main__":
    main()
