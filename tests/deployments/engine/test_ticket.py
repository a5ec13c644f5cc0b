"""A job's way through the engine: which phase may follow which, and what each change counts."""

from __future__ import annotations

import itertools

import pytest

from deployments.engine.ticket import TRANSITIONS, IllegalTransition, Phase, Ticket
from pipelines.job import Job, Task

WAITING, SUSPENDED, TAKEN, RESUMING, RUNNING, ENDED = Phase

LEGAL = {
    (WAITING, TAKEN),
    (TAKEN, RUNNING),
    (RUNNING, SUSPENDED),
    (SUSPENDED, RESUMING),
    (RESUMING, RUNNING),
    # The ranks were replaced under another job, or an order came late.
    (SUSPENDED, WAITING),
    (RUNNING, WAITING),
    # The gang broke under this job.
    (TAKEN, TAKEN),
    (RESUMING, TAKEN),
    (RUNNING, TAKEN),
    *((phase, ENDED) for phase in Phase if phase is not ENDED),
}

SHORTEST_WAYS = {
    WAITING: (),
    TAKEN: (TAKEN,),
    RUNNING: (TAKEN, RUNNING),
    SUSPENDED: (TAKEN, RUNNING, SUSPENDED),
    RESUMING: (TAKEN, RUNNING, SUSPENDED, RESUMING),
    ENDED: (ENDED,),
}


def ticket_in(*phases: Phase) -> Ticket:
    """A ticket that went through these phases."""
    job = Job(id="job", task=Task.TEXT_TO_VIDEO, prompt="", width=64, height=64, num_inference_steps=4, seeds=(1,))
    ticket = Ticket(job, {}, progress=False)
    for phase in phases:
        ticket.become(phase)
    return ticket


@pytest.mark.parametrize(("phase", "to"), list(itertools.product(Phase, Phase)))
def test_a_phase_changes_along_the_table_and_no_other_way(phase: Phase, to: Phase) -> None:
    ticket = ticket_in(*SHORTEST_WAYS[phase])
    assert ((phase, to) in LEGAL) == (to in TRANSITIONS[phase])
    if (phase, to) in LEGAL:
        ticket.become(to)
        assert ticket.phase is to
    else:
        with pytest.raises(IllegalTransition, match=f"{phase} -> {to}"):
            ticket.become(to)
        assert ticket.phase is phase


def test_it_waits_in_the_schedule_and_between_its_turns_only() -> None:
    ticket = ticket_in()
    ticket.waiting_since -= 5
    ticket.become(TAKEN)
    ticket.become(RUNNING)
    ticket.become(SUSPENDED)
    ticket.waiting_since -= 10
    ticket.become(WAITING)  # the ranks were replaced: it goes on waiting
    ticket.become(TAKEN)
    assert ticket.seconds_waited == pytest.approx(15, abs=1)
    waited = ticket.seconds_waited
    ticket.become(TAKEN)  # the gang broke: it does not leave it
    assert ticket.seconds_waited == waited


@pytest.mark.parametrize("way", [(TAKEN,), (TAKEN, RUNNING), (TAKEN, RUNNING, SUSPENDED, RESUMING)])
def test_a_break_under_it_is_another_attempt_from_the_first_step(way: tuple[Phase, ...]) -> None:
    ticket = ticket_in(*way)
    ticket.begun, ticket.steps_told = True, 3
    ticket.become(TAKEN)
    assert (ticket.breaks, ticket.begun, ticket.steps_told) == (1, False, 0)


def test_a_break_under_another_job_is_no_attempt_but_its_steps_begin_again() -> None:
    ticket = ticket_in(TAKEN, RUNNING, SUSPENDED)
    ticket.begun, ticket.steps_told = True, 3
    ticket.become(WAITING)
    ticket.become(TAKEN)
    assert (ticket.breaks, ticket.begun, ticket.steps_told) == (0, True, 0)


def test_a_job_that_resumes_goes_on_counting() -> None:
    ticket = ticket_in(TAKEN, RUNNING, SUSPENDED)
    ticket.steps_told = 3
    ticket.become(RESUMING)
    assert ticket.steps_told == 3


def test_the_ranks_hold_its_latents_until_it_runs_again() -> None:
    held = [phase for phase, way in SHORTEST_WAYS.items() if ticket_in(*way).is_held_by_ranks]
    assert held == [SUSPENDED, RESUMING]
