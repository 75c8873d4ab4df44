"""Everything at once, at random: see `tests.helpers.chaos` for what is done and what is allowed.

`CHAOS_SEED=N` repeats a run as far as a machine can; `python -m benchmarks chaos --seconds 600` does it for longer.
"""

from __future__ import annotations

import os
import secrets

import pytest

from tests.helpers.chaos import APP, EVENTS, OPTIONS, Chaos
from tests.helpers.server import Serve

SECONDS = 10.0
SEED = os.environ.get("CHAOS_SEED") or str(secrets.randbelow(10**6))


@pytest.mark.timeout(170)
@pytest.mark.parametrize("dispatch", ["auto", "connection", "request"])
def test_chaos(serve: Serve, dispatch: str) -> None:
    server = serve("--dispatch", dispatch, *OPTIONS, app=APP, workers=3)
    report = Chaos(server, SEED, seconds=SECONDS).run()
    print(report)
    assert report.faults == [], f"CHAOS_SEED={SEED}\n{report}"
    assert report.met["answers"] > 100
    assert report.events.keys() == EVENTS.keys()
