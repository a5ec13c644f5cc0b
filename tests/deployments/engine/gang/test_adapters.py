"""Adapters on a gang of two: both ranks have the same weights, and the base weights come back bit for bit."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio
import ray
import torch
from diffusers import WanTransformer3DModel

from deployments.engine.gang import Gang, GangBroken
from deployments.engine.rank import Rank
from deployments.errors import APIError
from deployments.interfaces import LoadedAdapter
from lora.factors import Delta, Factors
from pipelines.job import LoRASpec
from pipelines.model.bundled import model_directory
from tests.deployments.engine.gang.ranks import events_of, job, on
from tests.lora.adapters import train

pytestmark = [pytest.mark.gang, pytest.mark.asyncio(loop_scope="package")]


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def adapter(gang: Gang, tmp_path_factory: pytest.TempPathFactory) -> LoadedAdapter:
    transformer = WanTransformer3DModel.from_pretrained(model_directory() / "transformer")
    trained = train(transformer, ["to_q", "ffn.net.2"])
    folder = tmp_path_factory.mktemp("adapter")
    trained.peft_model.save_pretrained(folder)
    # The test owns the factors, as the state actor does in a server: they outlive the ranks.
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
            with suppress(ValueError):  # until they are lost, zeros are read, and refused
                await merge(gang, replace(adapter, factors=factors))
            await asyncio.sleep(0.1)

    with pytest.raises(APIError) as lost:
        await asyncio.wait_for(merge_until_ray_notices(), timeout=30)
    assert lost.value.status == 503
    assert (gang.composition, await weights_of(gang)) == ((), base)
