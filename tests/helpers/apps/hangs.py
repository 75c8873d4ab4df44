"""An application whose import never ends."""

from __future__ import annotations

import logging
import threading

app = None

logging.getLogger("uvicorn.error").info("The import goes on for ever")
threading.Event().wait()
