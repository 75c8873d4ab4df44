"""The example application, as long as the file named by SWITCH_FILE does not exist; then its import fails."""

from __future__ import annotations

import os

from examples.asgi_app import app as app

if os.path.exists(os.environ["SWITCH_FILE"]):
    raise RuntimeError("switched off")
