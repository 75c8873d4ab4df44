"""An application whose import ends the process, as a fault in a C extension would."""

from __future__ import annotations

import os

app = None

os._exit(7)
