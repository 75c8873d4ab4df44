"""What a request costs its worker, to decide whether its connection is worth a hand-off."""

from __future__ import annotations

from typing import Final

#: A request that holds the loop for longer than this (seconds) is worth a hand-off, so that the next one on its
#: connection can go to whoever is free.  With 2 workers at half their load both ways are equal at 0.85 ms of held loop;
#: at 0.55 ms keeping has the better mean by 13 %.  At either, handing on costs twice the processor time.
CHEAP: Final = 0.00075

#: Requests that are begun at once should not hold the loop for longer than this together (seconds).
_TOGETHER: Final = 0.0005

#: How much one more request moves the average.
_WEIGHT: Final = 0.05

#: One outlier must not make an application expensive whose other requests are not (seconds).  What such a request holds
#: up is taken back.
_MOST: Final = 0.002

#: At most so many, however cheap.
_BATCH: Final = 16


class Cost:
    """In seconds a request; starts as free."""

    def __init__(self) -> None:
        #: A moving average of how long its first step held the event loop, sleeping included.  What it does after its
        #: first await does not count: that holds up those that are kept and those that are not alike.
        self.average = 0.0

    def took(self, seconds: float, requests: int) -> None:
        """`requests` of them, at least one, held the loop for `seconds` together."""
        each = seconds / requests
        self.average += ((min(_MOST, each)) - self.average) * _WEIGHT

    @property
    def batch(self) -> int:
        """How many requests may be begun at once: what lies behind the first of them cannot be taken back."""
        average = self.average
        return _BATCH if average * _BATCH <= _TOGETHER else max(1, int(_TOGETHER / average))

    @property
    def cheap(self) -> bool:
        """Whether a connection is better kept than handed on."""
        return self.average < CHEAP
