"""The Engine deployment: one replica is one placement group with one gang, and the queue of jobs in front of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from ray import serve
from ray.util.placement_group import get_current_placement_group

from configs.model_family import ModelCard
from configs.server_args import ServerArgs
from deployments.adapters import LoadedAdapter
from deployments.clients import StateClient, connect_engine
from deployments.errors import APIError
from deployments.gang import Gang, GangBroken
from deployments.propagation import Composition, Merged, follow
from deployments.rank import JobFailed, Stopped
from deployments.state import state_actor
from pipelines.job import Event, Job, Media, Progress, Result

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
"""A job whose gang broke is run once more on the rebuilt gang, then failed."""

IDLE_CHECK_SECONDS = 2.0
"""Between two looks at an idle gang; a look at four ranks takes 3 ms."""

MAX_REBUILDS = 3
"""Failed rebuilds in a row after which the replica reports itself unhealthy, so that Serve replaces it."""


@dataclass(eq=False)
class Ticket:
    """One job's place in the queue, and the channel on which its events reach whoever asked for it."""

    job: Job
    media: Media
    progress: bool
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    enqueued: float = field(default_factory=time.monotonic)
    abandoned: bool = False
    """Nobody waits for the job any more: it leaves the queue, or stops at its current step."""

    async def next_event(self) -> Event:
        """Raises what the job failed with."""
        event = await self.events.get()
        if isinstance(event, Exception):
            raise event
        return event


class Engine:
    """Runs jobs one at a time, in the order of their arrival, on a gang that it rebuilds when it breaks.

    Constructed means ready: the constructor returns when every rank has loaded the model.
    """

    async def __init__(self, args: ServerArgs):  # type: ignore[misc] # Serve awaits it
        logging.getLogger("deployments").setLevel(args.log_level.upper())
        self.gang = Gang(args, get_current_placement_group())
        self.state = StateClient(state_actor(args, connect_engine))
        self.replica_id = serve.get_replica_context().replica_id.unique_id
        self.queue: deque[Ticket] = deque()
        self.running: Ticket | None = None
        self._queue_changed = asyncio.Condition()
        self._gang_in_use = asyncio.Lock()
        """First come, first served: a change of the default adapter waits for the running job, not for the queue."""
        self._failed_rebuilds = 0
        self._card = await self.gang.start()
        loops = (self._work(), self._watch_idle_gang(), self._follow_default_adapter())
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def card(self) -> ModelCard:
        return self._card

    async def ready(self) -> None:
        """Return once every rank has answered.

        Raises:
            APIError: 503; the gang is being rebuilt.
        """
        try:
            await self.gang.ping()
        except GangBroken as broken:
            raise APIError(503, f"The engine is replacing its workers: {broken}", code="not_ready") from None

    async def check_health(self) -> None:
        """Called by Serve; raising makes it replace this replica."""
        if self._failed_rebuilds >= MAX_REBUILDS:
            raise RuntimeError(f"{self._failed_rebuilds} rebuilds of the gang failed in a row")

    async def generate(self, job: Job, media: Media, progress: bool) -> AsyncIterator[Event]:
        """Queue `job` and give its events: with `progress`, one when it begins, one per denoising step; last its
        `Result`. Closing the iterator abandons the job.

        Whoever asks for a job again (the state actor, after a crash) takes it over from whoever asked before.
        """
        for older in [*self.queue, *([self.running] if self.running else [])]:
            if older.job.id == job.id:
                self._abandon(older)
        ticket = Ticket(job, media, progress)
        async with self._queue_changed:
            self.queue.append(ticket)
            self._queue_changed.notify()
        try:
            while not isinstance(event := await ticket.next_event(), Result):
                yield event
            yield event
        except (GeneratorExit, asyncio.CancelledError):
            self._abandon(ticket)
            raise

    def _abandon(self, ticket: Ticket) -> None:
        ticket.abandoned = True
        if ticket is self.running:
            self.gang.stop(ticket.job.id)
        elif ticket in self.queue:
            self.queue.remove(ticket)

    async def _work(self) -> None:
        """Take the oldest job, run it, take the next."""
        while True:
            async with self._queue_changed:
                await self._queue_changed.wait_for(lambda: self.queue)
            async with self._gang_in_use:
                if not self.queue:  # abandoned while the adapter changed
                    continue
                self.running = self.queue.popleft()
                try:
                    await self._run(self.running)
                except Exception as error:
                    self.running.events.put_nowait(error)
                finally:
                    self.running = None

    async def _run(self, ticket: Ticket) -> None:
        """Run a job, once more if the gang breaks under it.

        Raises:
            InvalidJob: the pipeline refuses the job.
            APIError: 500; it failed on the ranks, or broke the gang twice.
        """
        started = time.monotonic()
        if ticket.progress:
            ticket.events.put_nowait(Progress(0, ticket.job.num_inference_steps * len(ticket.job.seeds)))
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                await self._merge(ticket.job.lora)
                async for event in self.gang.run(ticket.job, ticket.media, ticket.progress):
                    if isinstance(event, Result):
                        event = replace(event, seconds={"queue": started - ticket.enqueued, **event.seconds})
                    ticket.events.put_nowait(event)
                return
            except Stopped:
                return
            except JobFailed as failed:
                raise APIError(500, f"The generation failed: {failed}", code="generation_failed") from None
            except GangBroken as broken:
                logger.error("the gang broke in job %s, attempt %d: %s", ticket.job.id, attempt, broken)
                reason = str(broken)
                await self._rebuild()
                if ticket.abandoned:
                    return
        raise APIError(500, f"The job broke its workers {MAX_ATTEMPTS} times: {reason}", code="worker_failed")

    async def _watch_idle_gang(self) -> None:
        """Replace a rank that dies while there is no job to notice it."""
        while True:
            await asyncio.sleep(IDLE_CHECK_SECONDS)
            if self._gang_in_use.locked():
                continue
            async with self._gang_in_use:
                try:
                    await self.gang.ping()
                except GangBroken as broken:
                    logger.error("the idle gang broke: %s", broken)
                    await self._rebuild()

    async def _rebuild(self) -> None:
        """Replace all ranks in the same placement group, trying until it works or Serve replaces the replica."""
        while True:
            self.gang.kill()
            try:
                await self.gang.start()
            except (GangBroken, ValueError) as error:
                self._failed_rebuilds += 1
                logger.error("rebuild %d failed: %s", self._failed_rebuilds, error)
                await asyncio.sleep(min(30, 2**self._failed_rebuilds))
            else:
                self._failed_rebuilds = 0
                return

    async def _merge(self, composition: Composition) -> None:
        if composition == self.gang.composition:
            return
        identities = {spec.identity for spec in composition}
        factors = {identity: await self.state.lora_factors(identity) for identity in identities}
        await self.gang.merge(composition, factors)

    async def _follow_default_adapter(self) -> None:
        """Merge each new default adapter as soon as the running job is done, and tell the state actor.

        A job would merge what it needs anyway; this makes `set_lora` fail early and the next job start at once.
        """
        while True:
            try:
                await follow(self.state, self.replica_id, self._merge_default)
            except APIError as error:  # the state actor restarts; it then tells us where it stands
                logger.info("the state actor does not answer: %s", error)
                await asyncio.sleep(1)

    async def _merge_default(self, composition: Composition) -> Merged:
        async with self._gang_in_use:
            failure = None
            try:
                await self._merge(composition)
            except GangBroken as broken:
                failure = str(broken)
                await self._rebuild()
            except Exception as error:
                logger.exception("the default adapter cannot be merged")
                failure = str(error)
            return Merged(self.gang.composition, failure, await self.gang.lora_bytes_held())

    async def identify_lora(self, path: str) -> str:
        """See `adapters.AdapterLoader`."""
        with _refused_adapter():
            return await self.gang.identify_lora(path)

    async def load_lora(self, path: str) -> LoadedAdapter:
        """See `adapters.AdapterLoader`."""
        with _refused_adapter():
            return await self.gang.load_lora(path)


@contextmanager
def _refused_adapter() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise APIError(400, str(error), param="lora_path", code="invalid_lora") from None
