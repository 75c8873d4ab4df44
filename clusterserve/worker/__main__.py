"""The file a worker process executes.

Run by path, so that it works whichever way the master found the package: the directory the interpreter put in front of
sys.path for this file gives way to the package's own.
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
if sys.path and sys.path[0] == _HERE:
    del sys.path[0]
_ROOT = os.path.dirname(os.path.dirname(_HERE))
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)

from clusterserve.importing import nothing_collected  # noqa: E402

with nothing_collected():
    from clusterserve.worker.main import main

if __name__ == "__main__":
    sys.exit(main())
