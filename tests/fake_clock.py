"""A clock for tests: seconds pass when they are told to."""

from __future__ import annotations


class Clock:
    """Called as ``time.monotonic`` is."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds
