"""`python -m clusterserve` is `clusterserve`."""

from __future__ import annotations

from clusterserve.importing import nothing_collected

with nothing_collected():
    from clusterserve.cli import main

if __name__ == "__main__":
    main()
