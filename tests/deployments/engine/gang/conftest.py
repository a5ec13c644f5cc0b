from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio
import ray

from configs.server_args import ServerArgs
from deployments.engine.gang import Gang

RANKS = 2


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def gang(ray_cluster: None) -> AsyncIterator[Gang]:
    """Two real rank actors over gloo, with the bundled model. Every test leaves them intact."""
    args = ServerArgs(num_gpus=RANKS, device="cpu", dtype="fp32")
    bundles = [{"CPU": args.num_cpus_per_rank}] * RANKS
    placement_group = ray.util.placement_group(bundles)
    await placement_group.ready()
    gang = Gang(args, placement_group)
    await gang.start()
    yield gang
    gang.kill()
    ray.util.remove_placement_group(placement_group)
