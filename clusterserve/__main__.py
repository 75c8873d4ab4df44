"""`python -m clusterserve` is `clusterserve`."""

from __future__ import annotations

from clusterserve.cli import main

if __name__ == "__main__":
    main()
