"""When a job counts as stuck, by a clock that the test sets."""

from __future__ import annotations

import pytest

from deployments.engine.stall import STALL_FACTOR, STALL_SECONDS, Advance, Stalled


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_job_may_be_silent_for_long_and_no_longer(clock: Clock) -> None:
    advance = Advance(clock)
    with advance.of_a_job():
        clock.seconds += STALL_SECONDS
        advance.check()
        clock.seconds += 1
        with pytest.raises(Stalled, match="its job has not come forward for 901 s"):
            advance.check()
        advance.step()
        advance.check()


def test_a_slow_job_may_be_silent_for_ten_of_its_steps(clock: Clock) -> None:
    advance = Advance(clock)
    with advance.of_a_job():
        clock.seconds += 300
        advance.step()
        clock.seconds += STALL_FACTOR * 300
        advance.check()
        clock.seconds += 1
        with pytest.raises(Stalled):
            advance.check()


def test_who_has_no_job_is_not_stuck_and_the_next_job_begins_anew(clock: Clock) -> None:
    advance = Advance(clock)
    with advance.of_a_job():
        clock.seconds += 1000
        advance.step()
    clock.seconds += 10 * STALL_SECONDS
    advance.check()
    with advance.of_a_job():
        clock.seconds += STALL_SECONDS + 1
        with pytest.raises(Stalled):
            advance.check()
