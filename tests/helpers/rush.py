"""`python -m tests.helpers.rush TALLY TOKENS GATE PLACE LIMIT`: in and out of a tally, as fast as it goes.

Begins when the pipe GATE ends, and ends when it has had a processor for `SHARE` seconds.  The semaphore TOKENS has as
many tokens as may be in: who is in takes one, and there must be one.  Prints how often it was let in, and how often
there was none.
"""

from __future__ import annotations

import os
import sys
import time

from clusterserve.channel.tally import Crowd, Tally

SHARE = 0.15


def main(tally: int, tokens: int, gate: int, place: int, limit: int) -> None:
    crowd, entered, exceeded = Crowd(Tally(tally), place, limit), 0, 0
    os.read(gate, 1)
    while time.process_time() < SHARE:
        if crowd.enter():
            entered += 1
            try:
                os.eventfd_read(tokens)
                os.eventfd_write(tokens, 1)
            except BlockingIOError:
                exceeded += 1
            crowd.leave()
    print(entered, exceeded)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
