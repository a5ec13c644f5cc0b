"""The Engine deployment: one replica is one placement group with one gang, and the queue of jobs in front of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial

from ray import serve
from ray.util.placement_group import get_current_placement_group

from configs.model_family import ModelCard
from configs.server_args import ServerArgs
from deployments import log
from deployments.clients import StateClient, connect_engine
from deployments.engine.default_adapter import follow_default_adapter
from deployments.engine.gang import Gang
from deployments.engine.metrics import EngineMetrics
from deployments.engine.recovery import Recovery
from deployments.engine.schedule import Full, Schedule
from deployments.engine.ticket import Ticket
from deployments.engine.turns import Turns
from deployments.errors import APIError
from deployments.interfaces import LoadedAdapter
from deployments.names import APPLICATION
from deployments.state.actor import state_actor
from pipelines.job import Event, Job, Media, Result


class Engine:
    """What the ingress, the state actor and Serve ask of a replica. Jobs wait in its `Schedule` for their `Turns` on
    its `Gang`.

    Constructed means ready: the constructor returns when every rank has loaded the model.
    """

    async def __init__(self, args: ServerArgs):  # type: ignore[misc] # Serve awaits it
        context = serve.get_replica_context()
        if context.app_name != APPLICATION:
            raise ValueError(f"the Serve application has to be named '{APPLICATION}', not '{context.app_name}'")
        log.configure(args, "engine")
        self.args = args
        self.gang = Gang(args, get_current_placement_group())
        self.recovery = Recovery(self.gang)
        self.schedule = Schedule(args.max_queue, preemption=not args.no_preemption)
        self.metrics = EngineMetrics()
        state = StateClient(partial(state_actor, args, connect_engine))
        self.turns = Turns(args, self.gang, self.recovery, self.schedule, state, self.metrics)
        self._card = await self.recovery.first_start()
        loops = (
            self.turns.work(),
            self.turns.heal_idle_gang(),
            follow_default_adapter(state, context.replica_id.unique_id, self.gang, self.turns),
        )
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def card(self) -> ModelCard:
        return self._card

    async def ready(self) -> None:
        """Return once every rank has answered.

        Raises:
            APIError: 503; the gang is being rebuilt.
        """
        await self.gang.ready()

    async def check_health(self) -> None:
        """Called by Serve; raising makes it replace this replica."""
        self.recovery.check()
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"the engine cannot go on: {task.exception()!r}")

    async def generate(self, job: Job, media: Media, progress: bool, asker: str = "") -> AsyncIterator[Event]:
        """Queue `job` and yield its events: with `progress`, one when it begins and those of its denoising steps; last
        its `Result`. Closing the iterator abandons the job.

        A repeated request for a job takes it over from the earlier one.

        Raises:
            APIError: 429, too many images wait; 504, its time is up; 500, it failed.
            InvalidJob: the pipeline refused it.
        """
        self._take_over(job, asker)
        ticket = Ticket(job, media, progress, asker)
        self._enqueue(ticket)
        try:
            with self.turns.time_limit(ticket, job.timeout):
                while not isinstance(event := await ticket.next_event(), Result):
                    yield event
                yield event
        except (GeneratorExit, asyncio.CancelledError):
            self.turns.abandon(ticket)
            raise

    def _take_over(self, job: Job, asker: str) -> None:
        """End what nobody here waits for once `asker` requests `job`: an earlier request for the same job and, if it is
        a video, the videos of another `asker`. That was a state actor which has crashed since. The new one requests all
        of its videos again, each from any replica."""
        running = self.turns.running
        for older in [*self.schedule] if running is None else [running, *self.schedule]:
            is_left = job.task.is_video and older.is_video and older.asker != asker
            if older.job.id == job.id or is_left:
                # The error ends a call that may still be open: it would keep this replica from draining.
                self.turns.abandon(older, "left", APIError(409, "The job was asked for again", code="taken_over"))

    def _enqueue(self, ticket: Ticket) -> None:
        try:
            self.schedule.add(ticket)
        except Full:
            wait = math.ceil(min(60, len(self.schedule) * self.turns.seconds_per_image))
            raise APIError(
                429,
                f"{self.args.max_queue} images are waiting already; try again in {wait} s.",
                code="queue_full",
                headers={"Retry-After": str(wait)},
            ) from None
        self.turns.notice_arrival()

    async def identify_lora(self, path: str) -> str:
        """See `interfaces.AdapterLoader`."""
        with _refused_adapter():
            return await self.gang.identify_lora(path)

    async def load_lora(self, path: str) -> LoadedAdapter:
        """See `interfaces.AdapterLoader`."""
        with _refused_adapter():
            return await self.gang.load_lora(path)


@contextmanager
def _refused_adapter() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise APIError(400, str(error), param="lora_path", code="invalid_lora") from None
