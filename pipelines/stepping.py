"""A pipeline call, which reports its steps to a progress bar, as an iterator over its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from math import inf
from typing import Any, Self, TypeVar

import torch
from greenlet import getcurrent, greenlet

T = TypeVar("T")


def iterate(function: Callable[[Callable[[T], object]], object]) -> Generator[T, None, None]:
    """Run `function(emit)` piecewise: each `emit(item)` suspends it and yields `item`; asking for the next resumes it.

    What `function` raises is raised here. Closing the iterator raises `GreenletExit` inside `function`, at the `emit`
    it is suspended in, so that its `with` and `finally` blocks run. Any number of such iterators may be advanced in
    turn, all from the one thread that made them. A greenlet and not a thread: CUDA graphs and the flags of autograd
    are kept per thread.

    Gradients are off while `function` runs and as the caller has them while it is suspended. Pipelines are decorated
    with `torch.no_grad()`, which notes the thread's flag on entry and restores it on exit: of two suspended pipelines
    the first to finish would otherwise switch gradients on for the other.
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
    """What a pipeline takes for its tqdm progress bar: every pipeline has one and updates it after each step."""

    def __init__(self, steps: Sequence[Any], on_step: Callable[[int, int], object]):
        """`on_step` is called with the number of steps done and of all."""
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
"""Of a step: what the GPU idles for until the next is queued, a few milliseconds, is a percent of it."""


class Pace:
    """Keeps the host near the GPU.

    Kernels are queued: without waiting, the host would report all steps as done within moments, and a stop would come
    too late for what is queued. After a slow step it waits for that step, so that a stop is one within a step. While
    steps are quick it waits for the one before, which leaves the GPU never idle.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._previous: torch.cuda.Event | None = None
        self._before = inf
        """Monotonic seconds at the end of the step before."""
        self._seconds = 0.0
        """That the last step took."""

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
        """Wait for all that was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
