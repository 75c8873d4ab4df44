"""What a run will ask, known before it starts: when each request arrives, and how long it takes to serve.

Pure: the same mix, rate, length and seed give the same schedule, for every server and for the theory.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Mix:
    """Service times in seconds, each with its share of the requests; the shares add up to 1."""

    parts: tuple[tuple[float, float], ...]

    @property
    def mean(self) -> float:
        return sum(share * seconds for share, seconds in self.parts)

    def __str__(self) -> str:
        return ",".join(f"{share:g}:{seconds * 1000:g}" for share, seconds in self.parts)

    @classmethod
    def parse(cls, text: str) -> Mix:
        """`SHARE:MILLISECONDS,...`; ValueError when it is none."""
        parts = []
        for part in text.split(","):
            share, colon, milliseconds = part.partition(":")
            if not colon:
                raise ValueError(f"{part!r} is not SHARE:MILLISECONDS")
            parts.append((float(share), float(milliseconds) / 1000))
        if not all(math.isfinite(number) and number >= 0 for part in parts for number in part):
            raise ValueError(f"{text!r} has a number that is no share and no time")
        if not math.isclose(sum(share for share, _ in parts), 1.0, abs_tol=1e-9):
            raise ValueError(f"the shares of {text!r} do not add up to 1")
        return cls(tuple(parts))


@dataclass(frozen=True)
class Schedule:
    """Seconds since the start, ascending, and what each of those requests takes, in seconds."""

    arrivals: tuple[float, ...]
    services: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.arrivals)


def poisson(mix: Mix, rate: float, seconds: float, seed: str) -> Schedule:
    """Arrivals that know nothing of each other, `rate` a second on average."""
    chance = random.Random(seed)
    arrivals = []
    now = chance.expovariate(rate)
    while now < seconds:
        arrivals.append(now)
        now += chance.expovariate(rate)
    shares = list(itertools.accumulate(share for share, _ in mix.parts))
    services = chance.choices([each for _, each in mix.parts], cum_weights=shares, k=len(arrivals))
    return Schedule(tuple(arrivals), tuple(services))


def mix_option(text: str) -> Mix:
    try:
        return Mix.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
