"""A gang of two real rank actors over gloo, with the bundled model."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio
import ray

from configs.server_args import ServerArgs
from deployments import gang as gang_module
from deployments.gang import Gang, GangBroken
from deployments.rank import Stopped, Suspended
from pipelines.job import Event, InvalidJob, Job, Media, Progress, Result, Task

pytestmark = [pytest.mark.gang, pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("ray_cluster")]

RANKS = 2


def job(name: str, steps: int = 3, **changes: object) -> Job:
    values = {"task": Task.TEXT_TO_IMAGE, "prompt": "a cat", "width": 64, "height": 64, "seeds": (1,)}
    return Job(id=name, num_inference_steps=steps, **{**values, **changes})


async def events_of(gang: Gang, a_job: Job, media: Media | None = None) -> list[Event]:
    return [event async for event in gang.run(a_job, media or {}, progress=True)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gang() -> AsyncIterator[Gang]:
    args = ServerArgs(num_gpus=RANKS, device="cpu", dtype="fp32")
    bundles = [{"CPU": args.num_cpus_per_rank}] * RANKS
    placement_group = ray.util.placement_group(bundles)
    await placement_group.ready()
    gang = Gang(args, placement_group)
    await gang.start()
    yield gang
    gang.kill()
    ray.util.remove_placement_group(placement_group)


async def test_a_job_gives_every_step_and_then_its_result(gang: Gang) -> None:
    *steps, result = await events_of(gang, job("steps"))
    assert steps == [Progress(1, 3), Progress(2, 3), Progress(3, 3)]
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


async def test_a_suspended_job_goes_on_where_it_was_left_and_gives_the_pixels_it_gives_alone(gang: Gang) -> None:
    alone = (await events_of(gang, job("alone", steps=6)))[-1]
    first: list[Event] = []
    with pytest.raises(Suspended):
        async for event in gang.run(job("in turns", steps=6), {}, progress=True):
            first.append(event)
            if len(first) == 1:
                gang.suspend("in turns")
    assert 0 < len(first) < 6
    assert isinstance((await events_of(gang, job("in between", seeds=(2,))))[-1], Result)
    rest = await events_of(gang, job("in turns", steps=6))
    assert [*first, *rest[:-1]] == [Progress(step, 6) for step in range(1, 7)]
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


async def test_a_killed_rank_breaks_the_gang_at_once_and_a_restart_heals_it(gang: Gang) -> None:
    running = asyncio.create_task(events_of(gang, job("doomed", steps=2000)))
    await asyncio.sleep(1)
    victim = await gang.ranks[1].ping.remote()
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(GangBroken, match="died"):
        await asyncio.wait_for(running, timeout=10)
    await heals(gang)


async def test_a_rank_that_hangs_breaks_the_gang_and_a_restart_heals_it(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang_module, "HANG_SECONDS", 3.0)
    running = asyncio.create_task(events_of(gang, job("stuck", steps=2000)))
    await asyncio.sleep(1)
    victim = await gang.ranks[1].ping.remote()
    os.kill(victim, signal.SIGSTOP)
    with pytest.raises(GangBroken, match="not answered"):
        await asyncio.wait_for(running, timeout=15)
    await heals(gang)
    with pytest.raises(ProcessLookupError):
        os.kill(victim, 0)


async def test_a_rank_without_memory_breaks_the_gang_and_a_restart_heals_it(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails alone, and the others would wait for it in their next collective."""
    monkeypatch.setattr(gang_module, "AGREEMENT_SECONDS", 1.0)
    victim = psutil.Process(await gang.ranks[1].ping.remote())
    victim.rlimit(psutil.RLIMIT_AS, (victim.memory_info().vms,) * 2)
    with pytest.raises(GangBroken, match=r"failed alone|died"):
        await asyncio.wait_for(events_of(gang, job("large", width=2048, height=2048)), timeout=60)
    await heals(gang)


async def heals(gang: Gang) -> None:
    gang.kill()
    assert not gang.loaded
    await gang.start()
    assert isinstance((await events_of(gang, job("healed")))[-1], Result)
