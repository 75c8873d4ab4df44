"""The example application, whose import waits as long as the file named by GATE_FILE exists."""

from __future__ import annotations

import os
import time

from examples import asgi_app

if os.path.exists(os.environ["GATE_FILE"]):
    asgi_app.logger.info("The import in slot %s waits at the gate", os.environ["CLUSTERSERVE_WORKER_SLOT"])
    while os.path.exists(os.environ["GATE_FILE"]):
        time.sleep(0.005)

app = asgi_app.app
