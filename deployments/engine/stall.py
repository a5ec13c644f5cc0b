"""Whether a rank's job still makes progress: a rank that is stuck inside a kernel still answers its pings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STALL_SECONDS = 900.0
"""How long a job may be silent, whatever it does: encode texts, compile its first step, decode a long video."""

STALL_FACTOR = 10.0
"""A job may be silent for this many times its longest silence so far: one with 5-minute steps decodes as slowly."""


class Stalled(Exception):
    """The running job has taken far longer than before without finishing a step."""


class Advance:
    """Records the steps of one job after another on the thread that computes, for a check on another thread."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._last: float | None = None
        """Time of the last step, in seconds; None while there is no job."""
        self._longest = 0.0

    @contextmanager
    def of_a_job(self) -> Iterator[None]:
        self._last, self._longest = self._now(), 0.0
        try:
            yield
        finally:
            self._last = None

    def step(self) -> None:
        """Record progress of the running job."""
        now = self._now()
        self._longest = max(self._longest, now - (self._last or now))
        self._last = now

    def check(self) -> None:
        """Raises `Stalled`."""
        last = self._last
        silent = 0.0 if last is None else self._now() - last
        if silent > max(STALL_SECONDS, STALL_FACTOR * self._longest):
            raise Stalled(f"its job has not come forward for {silent:.0f} s")
