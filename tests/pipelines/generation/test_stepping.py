"""How far the host may run ahead of a GPU, whose events and time are simulated here."""

from __future__ import annotations

import pytest
import torch

from pipelines.generation import stepping
from pipelines.generation.stepping import QUICK_SECONDS, Pace


class Gpu:
    """Takes `seconds` for each step, one after the other; queueing a step takes the host a moment."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seconds = 0.0
        self.busy_until = 0.0
        self.idle = 0.0
        """Seconds in which no step was queued."""

    def queue_a_step(self) -> None:
        self.now += 0.001
        self.idle += max(0.0, self.now - self.busy_until)
        self.busy_until = max(self.busy_until, self.now) + self.seconds


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()

    class Event:
        def record(self) -> None:
            self.at = gpu.busy_until

        def synchronize(self) -> None:
            gpu.now = max(gpu.now, self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(stepping.time, "monotonic", lambda: gpu.now)
    return gpu


def ahead(gpu: Gpu, steps: int) -> list[float]:
    """By how many steps the host is ahead of the GPU after each."""
    pace = Pace(torch.device("cuda"))
    distances = []
    for _ in range(steps):
        gpu.queue_a_step()
        pace.step()
        distances.append(round((gpu.busy_until - gpu.now) / gpu.seconds))
    return distances


def test_the_host_keeps_to_slow_steps(gpu: Gpu) -> None:
    gpu.seconds = 10 * QUICK_SECONDS
    assert ahead(gpu, 6) == [1, 1, 0, 0, 0, 0]


def test_quick_steps_follow_each_other_without_a_pause(gpu: Gpu) -> None:
    gpu.seconds = 0.1 * QUICK_SECONDS
    assert ahead(gpu, 6) == [1] * 6
    assert gpu.idle == pytest.approx(0.001)
