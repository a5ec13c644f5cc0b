"""Measures where the time of a job goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Wall seconds by stage; one stage runs at a time, and may run several times."""

    def __init__(self, *stages: str):
        """Starts with the first stage."""
        self.seconds = dict.fromkeys(stages, 0.0)
        self.stage = stages[0]
        self._since = time.perf_counter()

    def enter(self, stage: str) -> None:
        """End the running stage and begin this one."""
        now = time.perf_counter()
        self.seconds[self.stage] += now - self._since
        self.stage, self._since = stage, now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count the time inside towards no stage."""
        self.enter(self.stage)
        yield
        self._since = time.perf_counter()

    def stop(self) -> None:
        """End the running stage."""
        self.enter(self.stage)
