"""A gang of two real rank actors over gloo, with the bundled model."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
import ray
import torch
from diffusers import WanTransformer3DModel
from ray.exceptions import OutOfMemoryError

from configs.server_args import ServerArgs
from deployments import gang as gang_module
from deployments.adapters import LoadedAdapter
from deployments.errors import APIError
from deployments.gang import Gang, GangBroken
from deployments.rank import JobFailed, Rank, Stopped, Suspended
from lora.factors import Delta, Factors
from pipelines.bundled import model_directory
from pipelines.job import Event, InvalidJob, Job, LoRASpec, Media, Progress, Result, Task
from tests.lora.adapters import train

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


async def test_an_order_does_not_belong_to_the_request_that_gives_it(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would cancel it with the request, which it knows by the context of the call."""
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


@pytest.mark.parametrize("fails", ["encode_output", "encode_image"])
async def test_what_the_leader_cannot_encode_fails_alone_and_breaks_nothing(gang: Gang, fails: str) -> None:
    """An output amid several, or a preview: the other ranks are on their way to the next step."""

    def refuse(rank: Rank, function: str) -> None:
        from pipelines import generation

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
    *steps, result = await events_of(gang, job(f"after {fails}", seeds=(1, 2)))
    assert steps == [Progress(step, 6) for step in range(1, 7)]
    assert len(result.outputs) == 2
    assert [await rank.ping.remote() for rank in gang.ranks] == processes


# Adapters.


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def adapter(gang: Gang, tmp_path_factory: pytest.TempPathFactory) -> LoadedAdapter:
    transformer = WanTransformer3DModel.from_pretrained(model_directory() / "transformer")
    trained = train(transformer, ["to_q", "ffn.net.2"])
    folder = tmp_path_factory.mktemp("adapter")
    trained.peft_model.save_pretrained(folder)
    # Owned by the test, as the state actor owns them in a server: they outlive the ranks.
    loaded = await gang.load_lora(str(folder))
    return replace(loaded, factors=ray.put(await loaded.factors))


def weights(rank: Rank) -> str:
    """A digest of all of a rank's weights."""
    from hashlib import sha256

    digest = sha256()
    for transformer in rank.model.transformers.values():
        for tensor in transformer.state_dict().values():
            digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def failing(rank: Rank, error: Exception, restorable: bool = True) -> None:
    """Make a rank's next merges fail after half of the parameters."""
    from unittest import mock

    from lora import merge

    write_sum, calls = merge._write_sum, iter(range(1000))

    def write_sum_failing(*args: object) -> None:
        if next(calls) == 5:
            raise error
        write_sum(*args)

    merge._write_sum = write_sum_failing
    if not restorable:
        rank.merger._originals.read = mock.Mock(side_effect=OSError("the checkpoint is gone"))


async def on(rank: Any, function: Any, *args: Any) -> Any:
    """Call a function with the actor itself, inside of its process."""
    return await rank.__ray_call__.remote(function, *args)


async def weights_of(gang: Gang) -> list[str]:
    return [await on(rank, weights) for rank in gang.ranks]


def composition(adapter: LoadedAdapter, strength: float = 1.0) -> tuple[LoRASpec, ...]:
    return (LoRASpec(nickname="style", identity=adapter.identity, strength=strength),)


async def merge(gang: Gang, adapter: LoadedAdapter, strength: float = 1.0) -> None:
    await asyncio.wait_for(gang.merge(composition(adapter, strength), {adapter.identity: adapter.factors}), timeout=30)


async def restarted(gang: Gang) -> None:
    gang.kill()
    await gang.start()


async def test_an_adapter_is_merged_on_every_rank_and_taken_out_without_a_trace(
    gang: Gang, adapter: LoadedAdapter
) -> None:
    (base,) = set(await weights_of(gang))
    before = (await events_of(gang, job("before")))[-1]
    await merge(gang, adapter)
    assert gang.composition == composition(adapter)
    (merged,) = set(await weights_of(gang))
    assert merged != base
    assert (await events_of(gang, job("merged")))[-1].outputs != before.outputs
    await merge(gang, adapter, strength=0.5)
    assert set(await weights_of(gang)).isdisjoint({base, merged})
    await gang.merge((), {})
    assert set(await weights_of(gang)) == {base}
    assert (await events_of(gang, job("restored")))[-1].outputs == before.outputs


async def test_a_merge_that_fails_on_one_rank_alone_breaks_the_gang(gang: Gang, adapter: LoadedAdapter) -> None:
    base = await weights_of(gang)
    await on(gang.ranks[1], failing, MemoryError("no memory"))
    with pytest.raises(GangBroken, match="ranks differ after a merge: no memory"):
        await merge(gang, adapter)
    await restarted(gang)
    assert (gang.composition, await weights_of(gang)) == ((), base)
    await merge(gang, adapter)
    assert len(set(await weights_of(gang))) == 1
    await gang.merge((), {})


async def test_a_merge_that_fails_on_every_rank_leaves_the_base_weights_on_all(
    gang: Gang, adapter: LoadedAdapter
) -> None:
    base = await weights_of(gang)
    await merge(gang, adapter, strength=0.5)
    for rank in gang.ranks:
        await on(rank, failing, MemoryError("no memory"))
    with pytest.raises(MemoryError, match="no memory"):
        await merge(gang, adapter)
    assert (gang.composition, await weights_of(gang)) == ((), base)
    await merge(gang, adapter)
    await gang.merge((), {})
    assert await weights_of(gang) == base


async def test_ranks_that_cannot_restore_their_weights_are_replaced(gang: Gang, adapter: LoadedAdapter) -> None:
    base = await weights_of(gang)
    for rank in gang.ranks:
        await on(rank, failing, MemoryError("no memory"), False)
    with pytest.raises(GangBroken, match="base weights could not be restored"):
        await merge(gang, adapter)
    await restarted(gang)
    assert await weights_of(gang) == base


async def test_a_rank_that_dies_in_a_merge_breaks_the_gang(gang: Gang, adapter: LoadedAdapter) -> None:
    def dies(rank: Rank) -> None:
        rank.merger.merge = lambda composition: os.kill(os.getpid(), signal.SIGKILL)

    await on(gang.ranks[1], dies)
    with pytest.raises(GangBroken):
        await merge(gang, adapter)
    await restarted(gang)


async def test_an_adapter_for_another_model_leaves_what_was_merged(gang: Gang, adapter: LoadedAdapter) -> None:
    await merge(gang, adapter)
    merged = await weights_of(gang)
    misfit = Factors({"transformer": {"blocks.0.attn1.to_q.weight": Delta(torch.ones(3))}}).to_bytes()
    other = replace(adapter, identity="other", factors=ray.put(np.frombuffer(misfit, np.uint8)))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1\.to_q"):
        await merge(gang, other)
    assert (gang.composition, await weights_of(gang)) == (composition(adapter), merged)
    await gang.merge((), {})


async def test_factors_that_went_with_their_owner_change_nothing(gang: Gang, adapter: LoadedAdapter) -> None:
    @ray.remote(num_cpus=0)
    class Owner:
        def own(self) -> list[ray.ObjectRef]:
            return [ray.put(np.zeros(2**20, np.uint8))]

    base = await weights_of(gang)
    owner = Owner.remote()
    (factors,) = await owner.own.remote()
    ray.kill(owner)

    async def merge_until_ray_notices() -> None:
        while True:
            with suppress(ValueError):  # as long as they can be read: zeros are no factors
                await merge(gang, replace(adapter, factors=factors))
            await asyncio.sleep(0.1)

    with pytest.raises(APIError) as lost:
        await asyncio.wait_for(merge_until_ray_notices(), timeout=30)
    assert lost.value.status == 503
    assert (gang.composition, await weights_of(gang)) == ((), base)


# Death.


async def test_ranks_that_cannot_load_for_now_break_the_gang(gang: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    class UnluckyRank(Rank):
        def load(self, init_method: str | None) -> None:
            raise RuntimeError("CUDA out of memory")

    gang.kill()
    monkeypatch.setattr(gang_module, "Rank", UnluckyRank)
    with pytest.raises(GangBroken, match="could not load the model: RuntimeError: CUDA out of memory"):
        await gang.start()
    monkeypatch.undo()
    await waits_for_its_ranks_with_nobody_to_tell_and_nobody_to_ask(gang)
    await heals(gang)


async def waits_for_its_ranks_with_nobody_to_tell_and_nobody_to_ask(gang: Gang) -> None:
    gang.kill()
    assert not gang.loaded
    for order in (gang.stop, gang.suspend, gang.discard):
        order("a job")
    for question in (gang.identify_lora("a"), gang.load_lora("a"), gang.lora_bytes_held()):
        with pytest.raises(APIError) as refused:
            await question
        assert (refused.value.status, refused.value.code) == (503, "not_ready")


async def test_a_rank_that_ray_killed_for_want_of_memory_has_died(gang: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray has an error of its own for it."""

    async def killed(*args: object) -> None:
        raise OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node …")

    leader = SimpleNamespace(identify_lora=SimpleNamespace(remote=killed), ping=SimpleNamespace(remote=killed))
    monkeypatch.setattr(gang, "ranks", [leader])
    with pytest.raises(GangBroken, match=r"a rank died: Task was killed due to the node running low on memory\.$"):
        await gang.ping()
    with pytest.raises(APIError, match="replacing its workers: a rank died"):
        await gang.identify_lora("a")


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


async def test_ranks_that_are_stuck_in_their_job_break_the_gang_though_they_answer(gang: Gang) -> None:
    def sleep_in_the_next_job(rank: Rank) -> None:
        import time

        from deployments import stall
        from pipelines import generation

        stall.STALL_SECONDS = 1.0
        generation.generate = lambda *_: iter(lambda: time.sleep(60), "never")

    for rank in gang.ranks:
        await on(rank, sleep_in_the_next_job)
    with pytest.raises(GangBroken, match="a rank is stuck: its job has not come forward"):
        await asyncio.wait_for(events_of(gang, job("stuck in a kernel")), timeout=15)
    await heals(gang)


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
