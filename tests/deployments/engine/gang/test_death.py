"""Ranks that die, hang or fail alone break their gang, and a restart heals it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest
from ray.exceptions import OutOfMemoryError

from deployments.engine import gang as gang_module
from deployments.engine.gang import Gang, GangBroken
from deployments.engine.rank import Rank
from deployments.errors import APIError
from pipelines.job import Event, Result
from tests.deployments.engine.gang.ranks import events_of, job, on

pytestmark = [pytest.mark.gang, pytest.mark.asyncio(loop_scope="package")]


async def test_ranks_that_cannot_load_for_now_break_the_gang(gang: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    class UnluckyRank(Rank):
        def load(self, init_method: str | None) -> None:
            raise RuntimeError("CUDA out of memory")

    gang.kill()
    monkeypatch.setattr(gang_module, "Rank", UnluckyRank)
    with pytest.raises(GangBroken, match="could not load the model: RuntimeError: CUDA out of memory"):
        await gang.start()
    assert not gang.loaded
    monkeypatch.undo()
    await waits_for_its_ranks_with_nobody_to_tell_and_nobody_to_ask(gang)
    await heals(gang)


async def waits_for_its_ranks_with_nobody_to_tell_and_nobody_to_ask(gang: Gang) -> None:
    gang.kill()
    for order in (gang.stop, gang.suspend, gang.discard):
        order("a job")
    for question in (gang.identify_lora("a"), gang.load_lora("a"), gang.lora_bytes_held()):
        with pytest.raises(APIError) as refused:
            await question
        assert (refused.value.status, refused.value.code) == (503, "not_ready")


async def test_a_rank_that_ray_killed_for_want_of_memory_has_died(gang: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a separate error for this."""

    async def killed(*args: object) -> None:
        raise OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node …")

    leader = SimpleNamespace(identify_lora=SimpleNamespace(remote=killed), ping=SimpleNamespace(remote=killed))
    monkeypatch.setattr(gang, "ranks", [leader])
    with pytest.raises(GangBroken, match=r"a rank died: Task was killed due to the node running low on memory\.$"):
        await gang.ping()
    with pytest.raises(APIError, match="replacing its workers: a rank died"):
        await gang.identify_lora("a")


async def hit_amid_a_job(gang: Gang, signal_number: int) -> tuple[asyncio.Task[list[Event]], int]:
    """Send a signal to a rank's process while it computes; return the running job and the process id."""
    running = asyncio.create_task(events_of(gang, job("doomed", steps=2000)))
    await asyncio.sleep(1)
    victim = await gang.ranks[1].ping.remote()
    os.kill(victim, signal_number)
    return running, victim


async def test_a_killed_rank_breaks_the_gang_at_once_and_a_restart_heals_it(gang: Gang) -> None:
    running, _ = await hit_amid_a_job(gang, signal.SIGKILL)
    with pytest.raises(GangBroken, match="died"):
        await asyncio.wait_for(running, timeout=10)
    await heals(gang)


async def test_a_rank_that_hangs_breaks_the_gang_and_a_restart_heals_it(
    gang: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang_module, "HANG_SECONDS", 3.0)
    running, victim = await hit_amid_a_job(gang, signal.SIGSTOP)
    with pytest.raises(GangBroken, match="not answered"):
        await asyncio.wait_for(running, timeout=15)
    await heals(gang)
    with pytest.raises(ProcessLookupError):
        os.kill(victim, 0)


async def test_ranks_that_are_stuck_in_their_job_break_the_gang_though_they_answer(gang: Gang) -> None:
    def sleep_in_the_next_job(rank: Rank) -> None:
        import time

        from deployments.engine import stall
        from pipelines.generation import generation

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


@pytest.mark.parametrize(("rank", "reason"), [(0, "did not end the job with the others"), (1, "a rank failed alone")])
async def test_what_is_too_large_for_one_rank_breaks_the_gang_with_that_reason(
    gang: Gang, monkeypatch: pytest.MonkeyPatch, rank: int, reason: str
) -> None:
    """Only the leader has the encoders, for example; the others wait for it in a collective."""

    def run_out_of_memory(rank: Rank) -> None:
        import torch

        from pipelines.generation import generation

        def no_memory(*_: object) -> Iterator[Event]:
            raise torch.OutOfMemoryError("80 GB")
            yield

        generation.generate = no_memory

    monkeypatch.setattr(gang_module, "AGREEMENT_SECONDS", 1.0)
    await on(gang.ranks[rank], run_out_of_memory)
    with pytest.raises(GangBroken, match=reason) as broken:
        await asyncio.wait_for(events_of(gang, job("large for one")), timeout=15)
    assert str(broken.value.failure) == "OutOfMemoryError: 80 GB"
    await heals(gang)


async def heals(gang: Gang) -> None:
    gang.kill()
    assert not gang.loaded
    await gang.start()
    assert isinstance((await events_of(gang, job("healed")))[-1], Result)
