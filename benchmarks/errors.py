"""What can go wrong in a benchmark that its user can do something about: one sentence each."""

from __future__ import annotations


class BenchmarkError(Exception):
    """The run cannot go on; the text is all the user needs to see."""


class ServerFailedError(BenchmarkError):
    """One contender did not start or did not serve; who reports it names it, and measures the others."""
