"""A gang: the rank actors of one engine replica, one per bundle of its placement group, acting as one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs.model_family import ModelCard
from configs.server_args import ServerArgs
from deployments.adapters import LoadedAdapter
from deployments.errors import APIError
from deployments.rank import Rank, WeightsLost
from pipelines.job import Event, Job, LoRASpec, Media, Result

logger = logging.getLogger(__name__)

AGREEMENT_SECONDS = 10.0
"""How long the other ranks get to end a job after one of them has. They leave the same step together; longer means
that one of them is stuck in a collective whose peers have gone."""


class GangBroken(Exception):
    """A rank died, hung, or left the others: all of them must be replaced."""


class Gang:
    """Spawns the ranks and runs one thing at a time on all of them."""

    def __init__(self, args: ServerArgs, placement_group: PlacementGroup):
        self.args = args
        self.placement_group = placement_group
        self.ranks: list[Any] = []
        self.composition: tuple[LoRASpec, ...] = ()
        """The adapters merged into the weights of every rank."""

    async def start(self) -> ModelCard:
        """Spawn all ranks and load the model on them, at the same time.

        Raises:
            ValueError: the model cannot be loaded or sharded; the message is for the user.
            GangBroken: a rank died while loading.
        """
        places = self._bundles_by_node()
        nodes = [node for _, node in places]
        self.ranks = [self._spawn(rank, bundle, nodes.count(node)) for rank, (bundle, node) in enumerate(places)]
        self.composition = ()
        try:
            init_method = await self.ranks[0].rendezvous.remote() if len(self.ranks) > 1 else None
            cards = await asyncio.gather(*[rank.load.remote(init_method) for rank in self.ranks])
        except RayActorError as error:
            raise GangBroken(f"a rank died while the model was loading: {_first_line(error)}") from error
        except RayTaskError as error:
            raise error.cause from None
        return cards[0]

    def _bundles_by_node(self) -> list[tuple[int, str]]:
        """Bundle indices with their nodes, ranks of one node next to each other (Ulysses neighbours exchange most)."""
        bundles = placement_group_table(self.placement_group)["bundles_to_node_id"]
        node_of_replica = bundles[0]
        return sorted(bundles.items(), key=lambda item: (item[1] != node_of_replica, item[1], item[0]))

    def _spawn(self, rank: int, bundle: int, ranks_on_node: int) -> Any:
        options = {
            "num_cpus": self.args.num_cpus_per_rank,
            "num_gpus": 1 if self.args.device == "cuda" else 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.placement_group, bundle),
            "concurrency_groups": {"control": 2},
        }
        return ray.remote(**options)(Rank).remote(self.args, rank, ranks_on_node)

    async def run(self, job: Job, media: Media, progress: bool) -> AsyncIterator[Event]:
        """Run `job` on every rank and give rank 0's events.

        Raises:
            Stopped: `stop` was called.
            InvalidJob: the pipeline refused the job, on every rank alike.
            GangBroken: the ranks must be replaced.
        """
        shared = ray.put(dict(media)) if media else {}
        followers = [asyncio.ensure_future(_result(rank.follow.remote(job, shared))) for rank in self.ranks[1:]]
        leader = self.ranks[0].lead.options(num_returns="streaming").remote(job, shared, progress)
        try:
            while True:
                arriving = asyncio.ensure_future(_result(anext(leader)))
                await _first_failure(arriving, followers)
                event = arriving.result()
                yield event
                if isinstance(event, Result):
                    break
            await self._all_end(followers)
        except RayActorError as error:
            raise GangBroken(f"a rank died: {_first_line(error)}") from error
        except RayTaskError as error:
            # The ranks act alike, so each of them ends with this error; one that does not is stuck.
            await self._all_end(followers)
            raise error.cause from None

    async def _all_end(self, followers: Sequence[asyncio.Future[Any]]) -> None:
        if not followers:
            return
        _, pending = await asyncio.wait(followers, timeout=AGREEMENT_SECONDS)
        if pending:
            raise GangBroken(f"{len(pending)} of {len(self.ranks)} ranks did not end the job with the others")
        for follower in followers:
            error = follower.exception()
            if isinstance(error, RayActorError):
                raise GangBroken(f"a rank died: {_first_line(error)}") from error

    def stop(self, job_id: str) -> None:
        """End the running job at its current step; `run` then raises `Stopped`."""
        self.ranks[0].stop.remote(job_id)

    async def merge(self, composition: tuple[LoRASpec, ...], factors: Mapping[str, ray.ObjectRef]) -> None:
        """Merge `composition` into the weights of every rank, or of none.

        Args:
            factors: what `load_lora` gave, by identity. They stay in the object store, where every rank reads them.

        Raises:
            ValueError: an adapter does not fit; what was merged before still is.
            APIError: 503; the factors went with the process that owned them; what was merged before still is.
            GangBroken: the ranks no longer agree, or can't say what their weights are.
            Exception: whatever else failed on every rank (no memory, say); nothing is merged now.
        """
        outcomes = await asyncio.gather(
            *[_result(rank.merge.remote(composition, dict(factors))) for rank in self.ranks], return_exceptions=True
        )
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if not failures:
            self.composition = composition
            return
        causes = [failure.cause if isinstance(failure, RayTaskError) else failure for failure in failures]
        cause = causes[0]
        if len(causes) < len(outcomes) or len({type(cause) for cause in causes}) > 1:
            raise GangBroken(f"ranks differ after a merge: {_first_line(cause)}")
        if isinstance(cause, RayActorError | WeightsLost):
            raise GangBroken(f"a merge failed: {_first_line(cause)}")
        if isinstance(cause, ObjectLostError):
            raise APIError(503, "A part of the server is restarting; try again.", code="restarting")
        if not isinstance(cause, ValueError):
            self.composition = ()  # a merge that fails midway leaves the base weights
        raise cause

    async def identify_lora(self, path: str) -> str:
        """What lies at `path` on rank 0's node. Raises `ValueError` when it is no adapter."""
        return await self._of_leader(self.ranks[0].identify_lora.remote(path))

    async def load_lora(self, path: str) -> LoadedAdapter:
        """Read an adapter on rank 0, beside the running job. Raises `ValueError` when it does not fit the model."""
        return await self._of_leader(self.ranks[0].load_lora.remote(path))

    async def lora_bytes_held(self) -> int:
        """Host memory with which rank 0, and every other rank, keeps the original weights of what is merged."""
        return await self._of_leader(self.ranks[0].lora_bytes_held.remote())

    async def _of_leader(self, reference: Any) -> Any:
        try:
            return await reference
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            raise APIError(
                503, f"The engine is replacing its workers: {_first_line(error)}", code="not_ready"
            ) from None

    async def ping(self) -> None:
        """Return once every rank has answered. Raises `GangBroken` when one is dead."""
        try:
            await asyncio.gather(*[rank.ping.remote() for rank in self.ranks])
        except RayActorError as error:
            raise GangBroken(f"a rank died: {_first_line(error)}") from error

    def kill(self) -> None:
        """End every rank at once."""
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []


async def _result(reference: Any) -> Any:
    """The value of an object reference, or of the reference that an awaitable gives."""
    value = await reference
    return await value if isinstance(value, ray.ObjectRef) else value


async def _first_failure(arriving: asyncio.Future[Any], followers: Sequence[asyncio.Future[Any]]) -> None:
    """Wait for rank 0's next event, but no longer than until a follower dies."""
    waiting = {arriving, *(follower for follower in followers if not follower.done())}
    while not arriving.done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for follower in done - {arriving}:
            if isinstance(follower.exception(), RayActorError):
                arriving.cancel()
                raise follower.exception()  # type: ignore[misc]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
