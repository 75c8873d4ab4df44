"""`Cluster.log_stacks`: what SIGPWR does, for programs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from clusterserve import Cluster
from tests.helpers.waiting import eventually


def test_each_worker_is_a_block(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "stands.py").write_text("import time\n\ndef here():\n    time.sleep(600)\n\nhere()\n")
    cluster = Cluster(exec=str(tmp_path / "stands.py"), workers=2)
    cluster.log_stacks()
    with caplog.at_level(logging.WARNING, "clusterserve"):
        cluster.start()
        try:
            for worker in cluster.workers.values():
                head = f"Worker {worker.id} (slot {worker.slot}, pid {worker.pid}), stacks of its threads and tasks:"

                def told(head: str = head) -> bool:
                    cluster.log_stacks()
                    return any(head in text and "line 4 in here" in text for text in caplog.messages)

                eventually(told, head)
        finally:
            cluster.stop(quick=True)
