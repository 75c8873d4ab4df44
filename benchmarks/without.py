"""`python -m benchmarks.without STEP APP …`: clusterserve with one of the steps undone that make a hand-off cheap.

For `rate --only`: what a step buys is measured by leaving it out.  `batches` and `defer` are undone here, in the
master; `lazy` and `freeze` in each worker, by the application's module (`benchmarks.apps.hello_without`).
"""

from __future__ import annotations

import os
import sys

from clusterserve import cli
from clusterserve.master import dispatcher
from clusterserve.master.listeners import Listener

VARIABLE = "BENCHMARKS_WITHOUT"
STEPS = ("lazy", "batches", "defer", "freeze")


def _no_defer(self: Listener, on: bool) -> bool:
    return False


def main() -> None:
    step, arguments = sys.argv[1], sys.argv[2:]
    if step == "batches":
        vars(dispatcher)["EXPENSIVE"] = -1  # no connection is cheap enough to travel with others
    elif step == "defer":
        Listener.defer = _no_defer  # type: ignore[method-assign]
    # For the workers, which inherit it.
    os.environ[VARIABLE] = step
    cli.main(arguments)


if __name__ == "__main__":
    main()
