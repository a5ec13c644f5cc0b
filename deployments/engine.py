"""The Engine deployment: one replica is one placement group with one gang, and the queue of jobs in front of it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from ray import serve
from ray.util.placement_group import get_current_placement_group

from configs.model_family import ModelCard
from configs.server_args import ServerArgs
from deployments import log
from deployments.adapters import LoadedAdapter
from deployments.clients import StateClient, connect_engine
from deployments.errors import APIError, too_late
from deployments.gang import Gang, GangBroken
from deployments.metrics import EngineMetrics, Outcome
from deployments.names import APPLICATION
from deployments.propagation import Composition, Merged, follow
from deployments.rank import JobFailed, Stopped, Suspended
from deployments.recovery import Recovery
from deployments.schedule import Full, Schedule, Ticket
from deployments.state_actor import state_actor
from pipelines.job import Event, InvalidJob, Job, Media, Progress, Result

logger = logging.getLogger(__name__)

IMAGE_RETRIES = 1
"""An image whose gang broke is computed once more on the rebuilt gang, then fails: its client is waiting. A video has
`max_retries`."""


class Engine:
    """Runs jobs one at a time, in the order of its `Schedule`, on a gang that it rebuilds when it breaks.

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
        self.state = StateClient(partial(state_actor, args, connect_engine))
        self.replica_id = context.replica_id.unique_id
        self.schedule = Schedule(args.max_queue, preemption=not args.no_preemption)
        self.running: Ticket | None = None
        self.metrics = EngineMetrics()
        self._schedule_changed = asyncio.Condition()
        self._gang_in_use = asyncio.Lock()
        """First come, first served: a change of the default adapter waits for the running job, not for the queue."""
        self._seconds_per_image = 1.0
        self._card = await self.recovery.first_start()
        loops = (self._work(), self._heal_idle_gang(), self._follow_default_adapter())
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
        await self._enqueue(ticket)
        try:
            with self._time_limit(ticket, job.timeout):
                while not isinstance(event := await ticket.next_event(), Result):
                    yield event
                yield event
        except (GeneratorExit, asyncio.CancelledError):
            self._abandon(ticket)
            raise

    def _take_over(self, job: Job, asker: str) -> None:
        """End what nobody here waits for once `asker` requests `job`: an earlier request for the same job and, if it is
        a video, the videos of another `asker`. That was a state actor which has crashed since. The new one requests all
        of its videos again, each from any replica."""
        unfinished = list(self.schedule) if self.running is None else [self.running, *self.schedule]
        for older in unfinished:
            is_left = job.task.is_video and older.is_video and older.asker != asker
            if older.job.id == job.id or is_left:
                # The error ends a call that may still be open: it would keep this replica from draining.
                self._abandon(older, "left", APIError(409, "The job was asked for again", code="taken_over"))

    async def _enqueue(self, ticket: Ticket) -> None:
        async with self._schedule_changed:
            try:
                self.schedule.add(ticket)
            except Full:
                wait = math.ceil(min(60, len(self.schedule) * self._seconds_per_image))
                raise APIError(
                    429,
                    f"{self.args.max_queue} images are waiting already; try again in {wait} s.",
                    code="queue_full",
                    headers={"Retry-After": str(wait)},
                ) from None
            self._schedule_changed.notify()
        self.metrics.queue(self.schedule, self.running)
        self._let_images_pass()

    def _let_images_pass(self) -> None:
        if self.running is not None and self.schedule.should_give_way(self.running):
            self.gang.suspend(self.running.job.id)

    @contextmanager
    def _time_limit(self, ticket: Ticket, seconds: float | None) -> Iterator[None]:
        """Fail a job that does not leave the `with` body in time, and free the ranks within a step. None: no limit."""

        def expire() -> None:
            self._abandon(ticket, "timeout", too_late())

        timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, expire)
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def _abandon(self, ticket: Ticket, outcome: Outcome = "left", error: Exception | None = None) -> None:
        """End a job early: it leaves the queue, or stops at its current step."""
        if ticket.ended:
            return
        self._end(ticket, outcome, error)
        if ticket is self.running:
            self.gang.stop(ticket.job.id)
        else:
            self.schedule.remove(ticket)
            if ticket.suspended:
                self.gang.discard(ticket.job.id)
        self.metrics.queue(self.schedule, self.running)

    def _end(self, ticket: Ticket, outcome: Outcome, last: Result | Exception | None) -> None:
        ticket.ended = True
        with log.about(ticket.job.id):
            logger.info("%s, having waited %.2f s", outcome, ticket.seconds_waited)
        self.metrics.ended(ticket, outcome, last.seconds if isinstance(last, Result) else None)
        if last is not None:
            ticket.events.put_nowait(last)

    async def _work(self) -> None:
        """Take the next job, give it its turn, take the next."""
        while True:
            async with self._schedule_changed:
                await self._schedule_changed.wait_for(lambda: len(self.schedule))
            async with self._gang_in_use:
                if len(self.schedule):  # else the job was abandoned while the adapter changed
                    ticket = self.running = self.schedule.take(self.gang.composition)
                    self.metrics.queue(self.schedule, ticket)
                    await self._turn_or_fail(ticket)
                    self.running = None
                    self.metrics.queue(self.schedule, None)

    async def _turn_or_fail(self, ticket: Ticket) -> None:
        """Give a job its turn, and report its error to whoever waits for it."""
        try:
            with log.about(ticket.job.id):
                await self._turn(ticket)
        except Suspended:
            if ticket.ended:
                self.gang.discard(ticket.job.id)
            else:
                self.schedule.give_back(ticket)
                self.metrics.preemptions.inc()
        except Stopped:
            if not ticket.ended:  # by a late order that was meant for an earlier request for the same job
                self.schedule.put_back(ticket)
        except Exception as error:
            if not ticket.ended:
                self._end(ticket, "refused" if isinstance(error, InvalidJob) else "failed", error)
            if ticket.suspended:  # its adapters could not be merged again
                self.gang.discard(ticket.job.id)

    async def _turn(self, ticket: Ticket) -> None:
        """Run a job until it ends or gives way; restart it from its first step if the gang breaks under it.

        Raises:
            Suspended: it gave way to an image or to a new default adapter.
            Stopped: nobody waits for it any more.
            InvalidJob: the pipeline refuses the job.
            APIError: 500; it failed on the ranks, or broke the gang too often.
        """
        retries = self.args.max_retries if ticket.is_video else IMAGE_RETRIES
        while True:
            try:
                await self._merge(ticket.job.lora)
                await self._compute(ticket)
                return
            except JobFailed as failed:
                raise _failed(failed) from None
            except GangBroken as broken:
                ticket.breaks += 1
                ticket.begun = False
                logger.error("the gang broke under this job, break %d: %s", ticket.breaks, broken)
                await self._rebuild()
                if ticket.ended:
                    raise Stopped(ticket.job.id) from None
                if broken.failure is not None:
                    raise _failed(broken.failure) from None
                if ticket.breaks > retries:
                    message = f"The job broke its workers {ticket.breaks} times: {broken}"
                    raise APIError(500, message, code="worker_failed") from None
                self.metrics.retries.inc()

    async def _compute(self, ticket: Ticket) -> None:
        """One turn on an intact gang: pass on the job's events as `Gang.run` yields them."""
        started = time.monotonic()
        steps = ticket.job.num_inference_steps * len(ticket.job.seeds)
        if ticket.progress and not ticket.begun:
            ticket.events.put_nowait(Progress(0, steps))
        if not ticket.suspended:
            ticket.steps_told = 0
        ticket.begun, ticket.suspended = True, False
        self._let_images_pass()
        try:
            with self._time_limit(ticket, self._seconds_left(ticket)):
                async for event in self.gang.run(ticket.job, ticket.media, ticket.progress):
                    if isinstance(event, Progress):
                        self.metrics.steps(ticket, event.step - ticket.steps_told)
                        ticket.steps_told = event.step
                    if not isinstance(event, Result):
                        ticket.events.put_nowait(event)
                    elif not ticket.ended:
                        seconds = {"queue": ticket.seconds_waited, **event.seconds}
                        self._end(ticket, "completed", replace(event, seconds=seconds))
            if not ticket.progress:
                self.metrics.steps(ticket, steps)
        finally:
            ticket.seconds_run += time.monotonic() - started
        if not ticket.is_video:
            self._seconds_per_image += 0.2 * (ticket.seconds_run - self._seconds_per_image)

    def _seconds_left(self, ticket: Ticket) -> float | None:
        return None if self.args.job_timeout is None else max(0.0, self.args.job_timeout - ticket.seconds_run)

    async def _heal_idle_gang(self) -> None:
        """Replace the gang when it breaks while there is no job to notice it."""
        while True:
            await self.gang.lost()
            async with self._gang_in_use:
                if self.gang.is_lost:
                    logger.error("the idle gang broke")
                    await self._rebuild()

    async def _rebuild(self) -> None:
        """Replace all ranks. Suspended jobs restart from their first step."""
        for ticket in self.schedule:
            ticket.suspended = False
        self.metrics.rebuilds.inc()
        await self.recovery.rebuild()

    async def _merge(self, composition: Composition) -> None:
        if composition == self.gang.composition:
            return
        identities = {spec.identity for spec in composition}
        factors = {identity: await self.state.lora_factors(identity) for identity in identities}
        await self.gang.merge(composition, factors)
        self.metrics.lora_swaps.inc()

    async def _follow_default_adapter(self) -> None:
        """Merge each new default adapter as soon as the running job ends or gives way, and report to the state actor.

        A job would merge what it needs anyway, but this way `set_lora` fails early and the next job starts at once.
        """
        while True:
            try:
                await follow(self.state, self.replica_id, self._merge_default)
            except APIError as error:  # the state actor is restarting; `follow` then asks it afresh
                logger.info("the state actor does not answer: %s", error)
                await asyncio.sleep(1)

    async def _merge_default(self, composition: Composition) -> Merged:
        if self.running is not None and self.schedule.may_give_way(self.running):
            self.gang.suspend(self.running.job.id)  # `set_lora` waits for a step of a long video, not for all of it
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


def _failed(failure: JobFailed) -> APIError:
    return APIError(500, f"The generation failed: {failure}", code="generation_failed")


@contextmanager
def _refused_adapter() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise APIError(400, str(error), param="lora_path", code="invalid_lora") from None
