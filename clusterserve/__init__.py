"""Node.js's cluster for Python web servers."""

from __future__ import annotations

__version__ = "0.1.0"
