"""What a rank tells of its steps, and with how many threads it takes them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from deployments.rank import PROGRESS_SECONDS, Rank
from deployments.rank_process import threads_for
from pipelines.job import Event, Job, Media, OutputDone, Preview, Progress, Result, Task

JOB = Job(id="job", task=Task.TEXT_TO_IMAGE, prompt="p", width=64, height=64, num_inference_steps=4, seeds=(1,))


class PacedRank(Rank):
    """Takes four steps of so many seconds."""

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


@pytest.mark.parametrize(
    ("weights", "pixels", "cores", "threads"),
    [
        (500_000, 64 * 64 * 5, 8, 1),
        (500_000, 256 * 256 * 17, 8, 8),
        (4_000_000, 64 * 64, 8, 8),
        (0, 64 * 64, 8, 8),  # not known
        (4_000_000, 64 * 64, 0, 1),  # of four ranks on two cores
    ],
)
def test_threads_share_what_is_worth_sharing(weights: int, pixels: int, cores: int, threads: int) -> None:
    assert threads_for(weights, pixels, cores) == threads
