"""The example application, whose import takes its time."""

from __future__ import annotations

import time

from examples.asgi_app import app as app

time.sleep(3)
