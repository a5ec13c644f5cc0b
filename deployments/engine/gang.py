"""A gang: the rank actors of one engine replica, one per bundle of its placement group, acting as one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs.model_family import ModelCard
from configs.server_args import ServerArgs
from deployments.engine.rank import Rank, TooLarge, WeightsLost
from deployments.engine.stall import Stalled
from deployments.errors import APIError
from deployments.interfaces import LoadedAdapter
from deployments.losses import PROCESS_LOST, cause
from pipelines.job import Event, Job, LoRASpec, Media, Result
from pipelines.reasons import first_line

logger = logging.getLogger(__name__)

AGREEMENT_SECONDS = 10.0
"""How long the other ranks get to end a job after one has. They leave the same step together; taking longer means that
a rank is stuck in a collective whose peers are gone."""

PING_SECONDS = 2.0
"""Interval between checks for a hung rank; checking four ranks takes 3 ms. A death is noticed at once."""

HANG_SECONDS = 15.0
"""How long a rank may leave a ping unanswered before its process counts as stopped, or its machine as gone. A dedicated
thread answers, so a computing rank is not late; beside 30 busy processes on two cores it is late by a second or two."""

ROOM_SECONDS = 2.0
"""Interval between checks whether the cluster has room for the ranks of a lost node."""

T = TypeVar("T")


class GangBroken(Exception):
    """A rank died, hung, or left the others: all of them must be replaced."""

    def __init__(self, message: str, failure: TooLarge | None = None):
        """`failure` is the job's own error on one of them, if it would fail the same way on the next gang."""
        super().__init__(message)
        self.failure = failure


class Gang:
    """Spawns the ranks, runs one thing at a time on all of them, and notices when one of them is lost."""

    def __init__(self, args: ServerArgs, placement_group: PlacementGroup):
        self.args = args
        self.placement_group = placement_group
        self.ranks: list[Any] = []
        self.composition: tuple[LoRASpec, ...] = ()
        """The adapters merged into the weights of every rank."""
        self.loaded = False
        """Whether every rank has the model."""
        self._context = copy_context()
        self._watch: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Ends with `GangBroken`, when a rank is lost."""

    async def start(self) -> ModelCard:
        """Spawn all ranks and load the model on them, at the same time.

        Raises:
            ValueError: the model cannot be loaded or sharded; the message is for the user.
            GangBroken: a rank was lost while loading, or failed in a way that a retry may fix (no memory, say).
        """
        places = await self._bundles_by_node()
        nodes = [node for _, node in places]
        self.ranks = [self._spawn(rank, bundle, nodes.count(node)) for rank, (bundle, node) in enumerate(places)]
        self.composition = ()
        self._watch = asyncio.ensure_future(self._watch_ranks())
        card = await self._unless_lost(self._load())
        self.loaded = True
        return card

    async def _load(self) -> ModelCard:
        init_method = await _result(self.ranks[0].rendezvous.remote()) if len(self.ranks) > 1 else None
        try:
            cards = await asyncio.gather(*[_result(rank.load.remote(init_method)) for rank in self.ranks])
        except (GangBroken, ValueError):
            raise
        except Exception as error:
            message = f"a rank could not load the model: {type(error).__name__}: {first_line(error)}"
            raise GangBroken(message) from error
        return cards[0]

    async def _watch_ranks(self) -> None:
        """Watch the ranks until one is lost. Raises `GangBroken`."""
        await self._answers()  # their processes are starting, which may take any time
        vigils = [asyncio.ensure_future(_result(rank.keep_vigil.remote())) for rank in self.ranks]
        try:
            while True:
                await self.ping()
                over, _ = await asyncio.wait(vigils, timeout=PING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for vigil in over:
                    vigil.result()
        finally:
            for vigil in vigils:
                vigil.cancel()

    async def _unless_lost(self, work: Awaitable[T]) -> T:
        """The result of `work`, or `GangBroken` as soon as a rank is lost: ranks that wait for it may wait for long."""
        task = asyncio.ensure_future(work)
        await asyncio.wait((task, self._watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            self._watch.result()
        return task.result()

    async def lost(self) -> None:
        """Return once a rank is lost, or the gang is killed."""
        await asyncio.wait((self._watch,))

    @property
    def is_lost(self) -> bool:
        return self._watch.done()

    async def _bundles_by_node(self) -> list[tuple[int, str]]:
        """Bundle indices with their nodes, ranks of one node next to each other (Ulysses neighbours exchange most).

        Bundles of a lost node have no node until another has room for them, which may take any time.
        """
        while (table := placement_group_table(self.placement_group))["state"] != "CREATED":
            logger.warning("waiting for a node with room for the ranks of one that was lost")
            await asyncio.sleep(ROOM_SECONDS)
        bundles = table["bundles_to_node_id"]
        node_of_replica = bundles[0]
        return sorted(bundles.items(), key=lambda item: (item[1] != node_of_replica, item[1], item[0]))

    def _spawn(self, rank: int, bundle: int, ranks_on_node: int) -> Any:
        options = {
            "num_cpus": self.args.num_cpus_per_rank,
            "num_gpus": 1 if self.args.device == "cuda" else 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.placement_group, bundle),
            "concurrency_groups": {"control": 2, "health": 1, "vigil": 1},
        }
        return ray.remote(**options)(Rank).remote(self.args, rank, ranks_on_node)

    async def run(self, job: Job, media: Media, progress: bool) -> AsyncIterator[Event]:
        """Run `job` on every rank, or resume it if it was suspended, and yield rank 0's events.

        Raises:
            Stopped: `stop` was called.
            Suspended: `suspend` was called.
            InvalidJob: the pipeline refused the job, on every rank alike.
            JobFailed: the pipeline failed, on every rank alike.
            GangBroken: the ranks must be replaced.
        """
        shared = ray.put(dict(media)) if media else {}
        followers = [asyncio.ensure_future(_result(rank.follow.remote(job, shared))) for rank in self.ranks[1:]]
        leader = self.ranks[0].lead.options(num_returns="streaming").remote(job, shared, progress)
        try:
            while True:
                event = await self._unless_left(_result(anext(leader)), followers)
                yield event
                if isinstance(event, Result):
                    break
            await self._all_end(followers)
        except GangBroken:
            raise
        except Exception as error:
            # The ranks act alike, so each of them ends with this error; one that does not is stuck.
            await self._all_end(followers, error)
            raise
        finally:
            for follower in followers:
                follower.cancel()

    async def _unless_left(self, work: Awaitable[T], followers: Sequence[asyncio.Future[Any]]) -> T:
        """Rank 0's next event, or `GangBroken` when another rank is lost or has failed alone."""
        arriving = asyncio.ensure_future(work)
        try:
            while not arriving.done():
                failures = [error for each in followers if each.done() and (error := each.exception())]
                if dead := next((error for error in failures if isinstance(error, GangBroken)), None):
                    raise dead
                waited_for: set[asyncio.Future[Any]] = {arriving, self._watch}
                done, _ = await asyncio.wait(
                    waited_for | {each for each in followers if not each.done()},
                    timeout=AGREEMENT_SECONDS if failures else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not done:
                    raise GangBroken(f"a rank failed alone: {first_line(failures[0])}", _too_large(failures[0]))
                if self._watch in done and not arriving.done():
                    self._watch.result()
            return arriving.result()
        finally:
            arriving.cancel()

    async def _all_end(self, followers: Sequence[asyncio.Future[Any]], error: Exception | None = None) -> None:
        """Return once the other ranks have ended the job too; `error` is rank 0's, if any. Raises `GangBroken`."""
        if not followers:
            return
        _, pending = await asyncio.wait(followers, timeout=AGREEMENT_SECONDS)
        if pending:
            message = f"{len(pending)} of {len(self.ranks)} ranks did not end the job with the others"
            raise GangBroken(message, _too_large(error))
        for follower in followers:
            if isinstance(lost := follower.exception(), GangBroken):
                raise lost

    def stop(self, job_id: str) -> None:
        """End the running job at its current step; `run` then raises `Stopped`."""
        self._order(self.ranks[:1], "stop", job_id)

    def suspend(self, job_id: str) -> None:
        """Put the running job aside after its current step; `run` then raises `Suspended`, and later resumes it."""
        self._order(self.ranks[:1], "suspend", job_id)

    def discard(self, job_id: str) -> None:
        """Forget a suspended job. This precedes whatever runs next, since calls from one caller arrive in order."""
        self._order(self.ranks, "discard", job_id)

    def _order(self, ranks: Sequence[Any], order: str, job_id: str) -> None:
        """Send an order to these ranks. A gang that is being rebuilt has none yet, and nothing to order.

        The call is made in the gang's own context, not that of the request that ends here. Together with a request, Ray
        cancels whatever was called in its context: under load, 46 of 60 orders given by a cancelled request were lost,
        and the ranks kept computing for nobody."""
        for rank in ranks:
            self._context.run(getattr(rank, order).remote, job_id)

    async def merge(self, composition: tuple[LoRASpec, ...], factors: Mapping[str, ray.ObjectRef]) -> None:
        """Merge `composition` into the weights of every rank, or of none.

        Args:
            factors: what `load_lora` returned, by identity. They stay in the object store, where every rank reads them.

        Raises:
            ValueError: an adapter does not fit; what was merged before stays merged.
            APIError: 503; the factors are gone with the process that owned them; what was merged before stays merged.
            GangBroken: the ranks no longer agree, or no longer know their weights.
            Exception: whatever else failed on every rank (no memory, say); nothing is merged now.
        """
        merging = [_result(rank.merge.remote(composition, dict(factors))) for rank in self.ranks]
        outcomes = await self._unless_lost(asyncio.gather(*merging, return_exceptions=True))
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if not failures:
            self.composition = composition
            return
        failure = failures[0]
        if len(failures) < len(outcomes) or len({type(each) for each in failures}) > 1:
            raise GangBroken(f"ranks differ after a merge: {first_line(failure)}")
        if isinstance(failure, WeightsLost):
            raise GangBroken(f"a merge failed: {first_line(failure)}")
        if isinstance(failure, ObjectLostError):
            raise APIError(503, "A part of the server is restarting; try again.", code="restarting")
        if not isinstance(failure, GangBroken | ValueError):
            self.composition = ()  # a merge that fails midway leaves the base weights
        raise failure

    async def identify_lora(self, path: str) -> str:
        """Identity of the adapter at `path` on rank 0's node. Raises `ValueError` when there is none."""
        return await self._of_leader("identify_lora", path)

    async def load_lora(self, path: str) -> LoadedAdapter:
        """Read an adapter on rank 0, even while a job runs. Raises `ValueError` when it does not fit the model."""
        return await self._of_leader("load_lora", path)

    async def lora_bytes_held(self) -> int:
        """Bytes of host memory in which rank 0, like every other rank, keeps the original weights of merged layers."""
        return await self._of_leader("lora_bytes_held")

    async def _of_leader(self, question: str, *args: str) -> Any:
        with self._told_if_not_ready():
            return await _result(getattr(self.ranks[0], question).remote(*args))

    async def ready(self) -> None:
        """Return once every rank has answered. Raises `APIError` 503 while the gang is broken or being rebuilt."""
        with self._told_if_not_ready():
            await self.ping()

    @contextmanager
    def _told_if_not_ready(self) -> Iterator[None]:
        try:
            if not self.loaded:
                raise GangBroken("they load the model")
            yield
        except GangBroken as broken:
            raise APIError(503, f"The engine is replacing its workers: {broken}", code="not_ready") from None

    async def ping(self) -> None:
        """Return once every rank has answered. Raises `GangBroken` when one is dead, hangs, or is stuck in its job."""
        try:
            await asyncio.wait_for(self._answers(), HANG_SECONDS)
        except TimeoutError:
            raise GangBroken(f"a rank has not answered for {HANG_SECONDS:.0f} s") from None

    async def _answers(self) -> None:
        try:
            await asyncio.gather(*[_result(rank.ping.remote()) for rank in self.ranks])
        except Stalled as stalled:
            raise GangBroken(f"a rank is stuck: {stalled}") from None

    def kill(self) -> None:
        """Kill every rank at once."""
        self.loaded = False
        self._watch.cancel()
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []


def _too_large(error: BaseException | None) -> TooLarge | None:
    return error if isinstance(error, TooLarge) else None


async def _result(reference: Any) -> Any:
    """The value of an object reference, or of the reference that an awaitable returns.

    Raises:
        GangBroken: the rank's process is gone.
        Exception: what the rank's call raised.
    """
    try:
        value = await reference
        return await value if isinstance(value, ray.ObjectRef) else value
    except PROCESS_LOST as error:
        raise GangBroken(f"a rank died: {first_line(cause(error))}") from error
    except RayTaskError as error:
        raise cause(error) from None
