"""Whether the job that a rank computes still comes forward: a rank that is stuck inside a kernel answers its pings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STALL_SECONDS = 900.0
"""How long a job may be silent, whatever it does: encode texts, compile its first step, decode a long clip."""

STALL_FACTOR = 10.0
"""How many of the job's longest silences so far it may be silent: who takes 5 minutes a step decodes as slowly."""


class Stalled(Exception):
    """The running job has not come to the end of a step for far longer than before."""


class Advance:
    """Notes the steps of one job after the other, on the thread that computes, for whoever asks on another."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._last: float | None = None
        """Seconds; None while there is no job."""
        self._longest = 0.0

    @contextmanager
    def of_a_job(self) -> Iterator[None]:
        self._last, self._longest = self._now(), 0.0
        try:
            yield
        finally:
            self._last = None

    def step(self) -> None:
        """The running job has come forward."""
        now = self._now()
        self._longest = max(self._longest, now - (self._last or now))
        self._last = now

    def check(self) -> None:
        """Raises `Stalled`."""
        last = self._last
        silent = 0.0 if last is None else self._now() - last
        if silent > max(STALL_SECONDS, STALL_FACTOR * self._longest):
            raise Stalled(f"its job has not come forward for {silent:.0f} s")
