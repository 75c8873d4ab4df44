"""An application that cannot be imported."""

from __future__ import annotations

app = None

raise RuntimeError("the app's own trouble")
