"""Jobs on a gang of two: they yield events, stop, give way to others, fail."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from types import SimpleNamespace

import pytest

from deployments.engine.gang import Gang
from deployments.engine.rank import JobFailed, Rank, Stopped, Suspended
from pipelines.job import Event, InvalidJob, Progress, Result, Task
from tests.deployments.engine.gang.ranks import events_of, job, on

pytestmark = [pytest.mark.gang, pytest.mark.asyncio(loop_scope="package")]


def steps_told(events: list[Event], total: int) -> list[int]:
    """The reported steps, each once, in rising order. Not all steps that take less than 0.1 s are reported."""
    steps = [event.step for event in events if isinstance(event, Progress)]
    assert events == [Progress(step, total) for step in steps]
    assert steps == sorted(set(steps))
    return steps


async def test_a_job_gives_its_first_and_its_last_step_and_then_its_result(gang: Gang) -> None:
    *events, result = await events_of(gang, job("steps"))
    steps = steps_told(events, 3)
    assert (steps[0], steps[-1]) == (1, 3)
    assert isinstance(result, Result)
    assert result.outputs[0].data.startswith(b"\x89PNG")


async def test_equal_jobs_give_equal_bytes(gang: Gang) -> None:
    first, second = [(await events_of(gang, job(name)))[-1] for name in ("first", "second")]
    assert isinstance(first, Result)
    assert isinstance(second, Result)
    assert first.outputs == second.outputs


async def test_a_stopped_job_ends_within_a_step_on_every_rank_and_the_next_runs(gang: Gang) -> None:
    seen: list[Event] = []
    with pytest.raises(Stopped):
        async for event in gang.run(job("long", steps=500), {}, progress=True):
            seen.append(event)
            if len(seen) == 2:
                gang.stop("long")
    assert len(seen) < 50
    assert isinstance((await events_of(gang, job("after a stop")))[-1], Result)


async def test_a_late_stop_does_not_reach_the_next_job(gang: Gang) -> None:
    await events_of(gang, job("done"))
    gang.stop("done")
    assert isinstance((await events_of(gang, job("next")))[-1], Result)


async def test_an_order_does_not_belong_to_the_request_that_gives_it(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would cancel it with the request, which it recognises by the context of the call."""
    request = ContextVar("request", default="none")
    given: list[tuple[str, str]] = []
    rank = SimpleNamespace(stop=SimpleNamespace(remote=lambda job_id: given.append((job_id, request.get()))))
    monkeypatch.setattr(gang, "ranks", [rank])
    request.set("one that is cancelled")
    gang.stop("a job")
    assert given == [("a job", "none")]


async def test_a_suspended_job_goes_on_where_it_was_left_and_gives_the_pixels_it_gives_alone(gang: Gang) -> None:
    alone = (await events_of(gang, job("alone", steps=6)))[-1]
    first: list[Event] = []
    with pytest.raises(Suspended):
        async for event in gang.run(job("in turns", steps=6), {}, progress=True):
            first.append(event)
            if len(first) == 1:
                gang.suspend("in turns")
    left_in = steps_told(first, 6)[-1]
    assert left_in < 6
    assert isinstance((await events_of(gang, job("in between", seeds=(2,))))[-1], Result)
    rest = await events_of(gang, job("in turns", steps=6))
    assert left_in < steps_told(rest[:-1], 6)[0]
    assert isinstance(alone, Result)
    assert isinstance(rest[-1], Result)
    assert rest[-1].outputs == alone.outputs


async def test_a_job_told_to_suspend_before_it_begins_takes_one_step(gang: Gang) -> None:
    gang.suspend("a turn")
    seen: list[Event] = []
    with pytest.raises(Suspended):
        async for event in gang.run(job("a turn"), {}, progress=True):
            seen.append(event)
    assert seen == [Progress(1, 3)]
    gang.discard("a turn")
    assert (await events_of(gang, job("a turn")))[0] == Progress(1, 3)


async def test_what_the_pipeline_refuses_is_an_invalid_job_and_breaks_nothing(gang: Gang) -> None:
    with pytest.raises(InvalidJob, match="Not a PNG"):
        await events_of(gang, job("refused", task=Task.IMAGE_TO_VIDEO, images=("junk",)), {"junk": b"no picture"})
    assert isinstance((await events_of(gang, job("after a refusal")))[-1], Result)


@pytest.mark.parametrize("fails", ["encode_output", "encode_image"])
async def test_what_the_leader_cannot_encode_fails_alone_and_breaks_nothing(gang: Gang, fails: str) -> None:
    """One of several outputs, or a preview: the other ranks have moved on to the next step."""

    def refuse(rank: Rank, function: str) -> None:
        from pipelines.generation import generation

        def no_memory(*_: object) -> None:
            setattr(generation, function, encode)
            raise MemoryError("no memory")

        encode = getattr(generation, function)
        setattr(generation, function, no_memory)

    processes = [await rank.ping.remote() for rank in gang.ranks]
    await on(gang.ranks[0], refuse, fails)
    several = {"seeds": (1, 2, 3)} if fails == "encode_output" else {"partial_images": 2}
    with pytest.raises(JobFailed, match="MemoryError: no memory"):
        await asyncio.wait_for(events_of(gang, job(fails, **several)), timeout=30)
    *events, result = await events_of(gang, job(f"after {fails}", seeds=(1, 2)))
    assert steps_told(events, 6)[-1] == 6
    assert len(result.outputs) == 2
    assert [await rank.ping.remote() for rank in gang.ranks] == processes
