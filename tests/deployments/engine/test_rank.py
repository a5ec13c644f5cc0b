"""What a rank reports of its steps and failures, and how many threads it uses."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from deployments.engine import rank as rank_module
from deployments.engine.rank import PROGRESS_SECONDS, JobFailed, Rank, TooLarge
from deployments.engine.rank_process import end_if_device_is_lost, threads_for
from deployments.engine.stall import Advance
from pipelines.generation import generation
from pipelines.job import Event, Job, Media, OutputDone, Preview, Progress, Result, Task

JOB = Job(id="job", task=Task.TEXT_TO_IMAGE, prompt="p", width=64, height=64, num_inference_steps=4, seeds=(1,))


class PacedRank(Rank):
    """Takes four steps of `seconds` each."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def _steps(self, job: Job, media: Media) -> Iterator[Event]:
        for step in range(1, 5):
            time.sleep(self.seconds)
            yield Progress(step, 4)
        yield Preview(0, b"")
        yield OutputDone()
        yield Result(())


END: list[Event] = [Preview(0, b""), Result(())]


def test_steps_that_take_long_are_all_told() -> None:
    steps: list[Event] = [Progress(step, 4) for step in range(1, 5)]
    assert list(PacedRank(1.2 * PROGRESS_SECONDS).lead(JOB, {}, progress=True)) == steps + END


def test_of_quick_steps_the_first_and_the_last_are_told() -> None:
    assert list(PacedRank(0).lead(JOB, {}, progress=True)) == [Progress(1, 4), Progress(4, 4), *END]


def test_no_step_is_told_to_who_does_not_ask() -> None:
    assert list(PacedRank(0).lead(JOB, {}, progress=False)) == END


class FailingRank(Rank):
    """Computes one step, then fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]):
        self.model = SimpleNamespace(device=torch.device("cpu"))  # type: ignore[assignment]
        self.weights, self.cores, self.mesh = 0, 1, None
        self._orders, self._suspended, self._advance = {}, {}, Advance()
        self.latents: weakref.ref[Latents]

        def fail(model: object, job: Job, media: Media) -> Iterator[Event]:
            latents = Latents()
            self.latents = weakref.ref(latents)
            yield Progress(1, 4)
            raise error()

        monkeypatch.setattr(generation, "generate", fail)
        monkeypatch.setattr(rank_module.logger, "disabled", True)  # pytest keeps log records, with their frames


class Latents:
    """Stands in for what takes gigabytes on a GPU."""


@pytest.fixture
def no_cycle_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    ("error", "failure"),
    [(ArithmeticError, JobFailed), (torch.OutOfMemoryError, TooLarge)],
)
def test_a_failed_job_is_told_in_words_and_leaves_nothing_in_memory(
    monkeypatch: pytest.MonkeyPatch, no_cycle_collector: None, error: type[Exception], failure: type[JobFailed]
) -> None:
    rank = FailingRank(monkeypatch, lambda: error("no way"))
    with pytest.raises(failure, match=f"{error.__name__}: no way"):
        rank.follow(JOB, {})
    assert rank.latents() is None


def test_a_process_ends_that_cannot_compute_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    end_if_device_is_lost(torch.device("cuda"))
    assert ended == []

    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    end_if_device_is_lost(torch.device("cuda"))
    assert ended == [1]


@pytest.mark.parametrize(
    ("weights", "pixels", "cores", "threads"),
    [
        (500_000, 64 * 64 * 5, 8, 1),
        (500_000, 256 * 256 * 17, 8, 8),
        (4_000_000, 64 * 64, 8, 8),
        (0, 64 * 64, 8, 8),  # of unknown size
        (4_000_000, 64 * 64, 0, 1),  # one of four ranks on two cores
    ],
)
def test_threads_share_what_is_worth_sharing(weights: int, pixels: int, cores: int, threads: int) -> None:
    assert threads_for(weights, pixels, cores) == threads
