"""Turns on the gang: one job at a time, until it ends or gives way, on a gang that is rebuilt when it breaks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from configs.server_args import ServerArgs
from deployments import log
from deployments.clients import StateClient
from deployments.engine.gang import Gang, GangBroken
from deployments.engine.metrics import EngineMetrics, Outcome
from deployments.engine.rank import JobFailed, Stopped, Suspended
from deployments.engine.recovery import Recovery
from deployments.engine.schedule import Schedule
from deployments.engine.ticket import Phase, Ticket
from deployments.errors import APIError, too_late
from deployments.interfaces import Composition
from pipelines.job import InvalidJob, Progress, Result

logger = logging.getLogger(__name__)

IMAGE_RETRIES = 1
"""An image whose gang broke is computed once more on the rebuilt gang, then fails: its client is waiting. A video has
`max_retries`."""


class Turns:
    """Takes jobs from `schedule`, computes them on `gang`, and sends their events to whoever requested them."""

    def __init__(
        self,
        args: ServerArgs,
        gang: Gang,
        recovery: Recovery,
        schedule: Schedule,
        state: StateClient,
        metrics: EngineMetrics,
    ):
        self.running: Ticket | None = None
        """The job whose gang it is."""
        self.gang_in_use = asyncio.Lock()
        """First come, first served: a change of the default adapter waits for the running job, not for the queue."""
        self.seconds_per_image = 1.0
        """A moving average."""
        self._args = args
        self._gang = gang
        self._recovery = recovery
        self._schedule = schedule
        self._state = state
        self._metrics = metrics
        self._arrival = asyncio.Event()

    # What happens to a job from outside: it arrives, runs out of time, is left.

    def notice_arrival(self) -> None:
        """A job has been added to the schedule."""
        self._arrival.set()
        self._count()
        self._let_images_pass()

    def abandon(self, ticket: Ticket, outcome: Outcome = "left", error: Exception | None = None) -> None:
        """End a job early: it leaves the queue, or stops at its current step."""
        if ticket.ended:
            return
        if ticket.is_waiting:
            self._schedule.remove(ticket)
        if ticket.phase is Phase.RUNNING:
            self._gang.stop(ticket.job.id)
        self._end(ticket, outcome, error)
        self._count()

    @contextmanager
    def time_limit(self, ticket: Ticket, seconds: float | None) -> Iterator[None]:
        """Fail a job that does not leave the `with` body in time, and free the ranks within a step. None: no limit."""

        def expire() -> None:
            self.abandon(ticket, "timeout", too_late())

        timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, expire)
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def _let_images_pass(self) -> None:
        if self.running is not None and self._schedule.should_give_way(self.running):
            self._gang.suspend(self.running.job.id)

    def make_way(self) -> None:
        """Have a long video leave the gang after its current step, for what waits on `gang_in_use`."""
        if self.running is not None and self._schedule.may_give_way(self.running):
            self._gang.suspend(self.running.job.id)

    # Turns.

    async def work(self) -> None:
        """Take the next job, give it its turn, take the next."""
        while True:
            await self._arrival.wait()
            async with self.gang_in_use:
                if len(self._schedule):
                    ticket = self.running = self._schedule.take(self._gang.composition)
                    self._count()
                    await self._turn_or_fail(ticket)
                    self.running = None
                    self._count()
                else:
                    self._arrival.clear()

    async def _turn_or_fail(self, ticket: Ticket) -> None:
        """Give a job its turn, and report its error to whoever waits for it."""
        try:
            with log.about(ticket.job.id):
                await self._turn(ticket)
        except Suspended:
            if ticket.ended:
                self._gang.discard(ticket.job.id)
            else:
                self._schedule.give_back(ticket)
                self._metrics.preemptions.inc()
        except Stopped:
            if not ticket.ended:  # by a late order that was meant for an earlier request for the same job
                self._schedule.put_back(ticket)
        except Exception as error:
            if not ticket.ended:
                self._end(ticket, "refused" if isinstance(error, InvalidJob) else "failed", error)

    async def _turn(self, ticket: Ticket) -> None:
        """Run a job until it ends or gives way; restart it from its first step if the gang breaks under it.

        Raises:
            Suspended: it gave way to an image or to a new default adapter.
            Stopped: nobody waits for it any more.
            InvalidJob: the pipeline refuses the job.
            APIError: 500; it failed on the ranks, or broke the gang too often.
        """
        retries = self._args.max_retries if ticket.is_video else IMAGE_RETRIES
        while True:
            try:
                await self.merge(ticket.job.lora)
                if not ticket.ended:
                    await self._compute(ticket)
                return
            except JobFailed as failed:
                raise _failed(failed) from None
            except GangBroken as broken:
                if not ticket.ended:
                    ticket.become(Phase.TAKEN)
                logger.error("the gang broke under this job, break %d: %s", ticket.breaks, broken)
                await self.rebuild()
                if ticket.ended:
                    return
                if broken.failure is not None:
                    raise _failed(broken.failure) from None
                if ticket.breaks > retries:
                    message = f"The job broke its workers {ticket.breaks} times: {broken}"
                    raise APIError(500, message, code="worker_failed") from None
                self._metrics.retries.inc()

    async def _compute(self, ticket: Ticket) -> None:
        """One turn on an intact gang: pass on the job's events as `Gang.run` yields them."""
        started = time.monotonic()
        steps = ticket.job.num_inference_steps * len(ticket.job.seeds)
        if ticket.progress and not ticket.begun:
            ticket.events.put_nowait(Progress(0, steps))
        ticket.begun = True
        ticket.become(Phase.RUNNING)
        self._let_images_pass()
        try:
            with self.time_limit(ticket, self._seconds_left(ticket)):
                async for event in self._gang.run(ticket.job, ticket.media, ticket.progress):
                    if isinstance(event, Progress):
                        self._metrics.steps(ticket, event.step - ticket.steps_told)
                        ticket.steps_told = event.step
                    if not isinstance(event, Result):
                        ticket.events.put_nowait(event)
                    elif not ticket.ended:
                        seconds = {"queue": ticket.seconds_waited, **event.seconds}
                        self._end(ticket, "completed", replace(event, seconds=seconds))
            if not ticket.progress:
                self._metrics.steps(ticket, steps)
        finally:
            ticket.seconds_run += time.monotonic() - started
        if not ticket.is_video:
            self.seconds_per_image += 0.2 * (ticket.seconds_run - self.seconds_per_image)

    def _seconds_left(self, ticket: Ticket) -> float | None:
        return None if self._args.job_timeout is None else max(0.0, self._args.job_timeout - ticket.seconds_run)

    def _end(self, ticket: Ticket, outcome: Outcome, last: Result | Exception | None) -> None:
        if ticket.is_held_by_ranks:
            self._gang.discard(ticket.job.id)
        ticket.become(Phase.ENDED)
        with log.about(ticket.job.id):
            logger.info("%s, having waited %.2f s", outcome, ticket.seconds_waited)
        self._metrics.ended(ticket, outcome, last.seconds if isinstance(last, Result) else None)
        if last is not None:
            ticket.events.put_nowait(last)

    def _count(self) -> None:
        self._metrics.queue(self._schedule, self.running)

    # The gang between turns. Whoever calls these holds `gang_in_use`.

    async def merge(self, composition: Composition) -> None:
        """Make `composition` what is merged into the gang's weights; see `Gang.merge` for what is raised."""
        if composition == self._gang.composition:
            return
        identities = {spec.identity for spec in composition}
        factors = {identity: await self._state.lora_factors(identity) for identity in identities}
        await self._gang.merge(composition, factors)
        self._metrics.lora_swaps.inc()

    async def rebuild(self) -> None:
        """Replace all ranks. Suspended jobs restart from their first step."""
        self._schedule.forget_latents()
        self._metrics.rebuilds.inc()
        await self._recovery.rebuild()

    async def heal_idle_gang(self) -> None:
        """Replace the gang, forever, when it breaks while there is no job to notice it."""
        while True:
            await self._gang.lost()
            async with self.gang_in_use:
                if self._gang.is_lost:
                    logger.error("the idle gang broke")
                    await self.rebuild()


def _failed(failure: JobFailed) -> APIError:
    return APIError(500, f"The generation failed: {failure}", code="generation_failed")
