"""When a worker is worn: it has served enough, long enough, or holds too much memory.

Once worn, always worn: a verdict that came and went would start replacements that nobody needs.
"""

from __future__ import annotations

from dataclasses import dataclass

_MIB = 1 << 20


@dataclass
class Wear:
    """What a worker may take (0: without limit), and what it has taken so far."""

    #: Requests.
    requests: int = 0
    #: Seconds from when it listens.
    lifetime: float = 0.0
    #: Bytes, and how many samples in a row must be above.
    rss: int = 0
    samples: int = 1
    served: int = 0
    over: int = 0
    #: The sample that was one too many.
    heaviest: int = 0

    def count(self, served: int) -> None:
        """So many requests it has served until now."""
        self.served = max(self.served, served)

    def weigh(self, rss: int) -> None:
        """So much memory it holds now, in bytes."""
        if not self.rss or self.over >= self.samples:
            return
        self.over = self.over + 1 if rss > self.rss else 0
        self.heaviest = rss

    def reason(self, since: float, now: float) -> str:
        """Why it is worn, as a clause that follows "worker N, which"; empty as long as it is not."""
        if self.requests and self.served >= self.requests:
            return f"has served {self.served} requests"
        if self.rss and self.over >= self.samples:
            return f"holds {self.heaviest / _MIB:.0f} MiB of memory, more than {self.rss / _MIB:.0f}"
        # Compared as the deadline is made: a sum that is rounded otherwise would ask again at once, and again.
        if self.lifetime and now >= since + self.lifetime:
            return f"has served for {self.lifetime:.0f} s"
        return ""
