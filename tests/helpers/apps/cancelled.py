"""Does not even raise an error when it is imported, and says much."""

from __future__ import annotations

import asyncio

raise asyncio.CancelledError("begun " + "\N{GRINNING FACE}" * (1 << 20) + " done")
