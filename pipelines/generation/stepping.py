"""Turns a pipeline call, which reports its steps to a progress bar, into an iterator over its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from math import inf
from typing import Any, Self, TypeVar

import torch
from greenlet import getcurrent, greenlet

T = TypeVar("T")


def iterate(function: Callable[[Callable[[T], object]], object]) -> Generator[T, None, None]:
    """Run `function(emit)` piecewise: each `emit(item)` suspends it and yields `item`; requesting the next resumes it.

    Exceptions from `function` propagate to the caller. Closing the iterator raises `GreenletExit` inside `function`, at
    the `emit` where it is suspended, so that its `with` and `finally` blocks run. Any number of such iterators may be
    advanced in turn, all from the one thread that made them. A greenlet and not a thread: CUDA graphs and autograd's
    flags are kept per thread.

    Gradients are off while `function` runs; while it is suspended they are as the caller has set them. Pipelines are
    decorated with `torch.no_grad()`, which saves the thread's flag on entry and restores it on exit: of two suspended
    pipelines the first to finish would otherwise switch gradients on for the other.
    """
    caller = getcurrent()
    running = greenlet(function)
    try:
        with torch.no_grad():
            item = running.switch(caller.switch)
        while not running.dead:
            yield item
            with torch.no_grad():
                item = running.switch()
    finally:
        if not running.dead:
            running.throw()


class StepBar:
    """Stands in for the tqdm progress bar that every pipeline has and updates after each step."""

    def __init__(self, steps: Sequence[Any], on_step: Callable[[int, int], object]):
        """`on_step` is called with the number of steps done and the total."""
        self.steps = steps
        self.on_step = on_step
        self.done = 0

    def update(self, count: int = 1) -> None:
        self.done += count
        self.on_step(self.done, len(self.steps))

    def __iter__(self) -> Iterator[Any]:
        for step in self.steps:
            yield step
            self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


QUICK_SECONDS = 0.3
"""The duration from which a step counts as slow: idling a few milliseconds after it costs the GPU about 1 %."""


class Pace:
    """Keeps the host from running far ahead of the GPU.

    Kernels are queued: without waiting, the host would report all steps as done within moments, and a stop would come
    too late for what is queued. While steps are slow, the host waits for each one, so that a stop takes effect within a
    step. While they are quick, it waits only for the previous one, so that the GPU never idles.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._previous: torch.cuda.Event | None = None
        self._before = inf
        """Monotonic seconds at the end of the previous step."""
        self._seconds = 0.0
        """Duration of the last step."""

    def step(self) -> None:
        if self.device.type == "cuda":
            current = torch.cuda.Event()
            current.record()
            awaited = current if self._seconds > QUICK_SECONDS else self._previous
            if awaited is not None:
                awaited.synchronize()
            now = time.monotonic()
            self._seconds = now - self._before
            self._previous, self._before = current, now

    def finish(self) -> None:
        """Wait for everything that is queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
