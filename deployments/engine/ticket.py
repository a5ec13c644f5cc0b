"""A job's way through an engine replica: its phases, which of them may follow which, and the channel of its events.

Only `Ticket.become` changes a phase, along `TRANSITIONS`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pipelines.job import Event, Job, Media


class Phase(StrEnum):
    WAITING = "waiting"
    """In the schedule. It will compute from its first step."""
    SUSPENDED = "suspended"
    """In the schedule. It gave way between two steps, and the ranks hold its latents."""
    TAKEN = "taken"
    """The gang is its own and merges its adapters. It will compute from its first step."""
    RESUMING = "resuming"
    """The gang is its own and merges its adapters. The ranks hold its latents."""
    RUNNING = "running"
    """The ranks compute it."""
    ENDED = "ended"
    """It has sent its last event, or nobody waits for it any more."""


TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.TAKEN, Phase.ENDED}),
    # To `waiting`: the ranks were replaced, and its latents are lost.
    Phase.SUSPENDED: frozenset({Phase.RESUMING, Phase.WAITING, Phase.ENDED}),
    # Here and below, to `taken`: the gang broke under it, and another attempt begins.
    Phase.TAKEN: frozenset({Phase.RUNNING, Phase.TAKEN, Phase.ENDED}),
    Phase.RESUMING: frozenset({Phase.RUNNING, Phase.TAKEN, Phase.ENDED}),
    # To `waiting`: it was stopped by an order that was not meant for it.
    Phase.RUNNING: frozenset({Phase.SUSPENDED, Phase.WAITING, Phase.TAKEN, Phase.ENDED}),
    Phase.ENDED: frozenset(),
}

IN_SCHEDULE = frozenset({Phase.WAITING, Phase.SUSPENDED})
HELD_BY_RANKS = frozenset({Phase.SUSPENDED, Phase.RESUMING})


class IllegalTransition(RuntimeError):
    """A bug in the caller: `TRANSITIONS` does not allow this change."""


@dataclass(eq=False)
class Ticket:
    """One job's place in the queue, and the channel on which its events reach whoever requested it."""

    job: Job
    media: Media
    progress: bool
    """Whether its steps are reported."""
    asker: str = ""
    """The process that requested it."""
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    phase: Phase = Phase.WAITING
    begun: bool = False
    """Its step 0 was reported. It is reported again only after the gang broke under this job: another attempt."""
    steps_told: int = 0
    """The last of its steps that the ranks reported."""
    breaks: int = 0
    """Times the gang broke under it."""
    overtaken: int = 0
    """Turns of later jobs since it arrived, or since its own last turn."""
    waiting_since: float = field(default_factory=time.monotonic)
    seconds_waited: float = 0.0
    """Before its first turn and between its turns."""
    seconds_run: float = 0.0

    @property
    def is_video(self) -> bool:
        return self.job.task.is_video

    @property
    def ended(self) -> bool:
        return self.phase is Phase.ENDED

    @property
    def is_waiting(self) -> bool:
        """Whether it is in the schedule."""
        return self.phase in IN_SCHEDULE

    @property
    def is_held_by_ranks(self) -> bool:
        """Whether the ranks hold its latents between two of its turns."""
        return self.phase in HELD_BY_RANKS

    def become(self, phase: Phase) -> None:
        """Enter a phase, with what it means for the clock and the counts. Raises `IllegalTransition`."""
        if phase not in TRANSITIONS[self.phase]:
            raise IllegalTransition(f"job {self.job.id}: {self.phase} -> {phase}")
        before, self.phase = self.phase, phase
        match before, phase:
            case ((Phase.WAITING | Phase.SUSPENDED), (Phase.TAKEN | Phase.RESUMING)):
                self.seconds_waited += time.monotonic() - self.waiting_since
            case Phase.RUNNING, (Phase.WAITING | Phase.SUSPENDED):
                self.waiting_since = time.monotonic()
            case ((Phase.TAKEN | Phase.RESUMING | Phase.RUNNING), Phase.TAKEN):
                self.breaks += 1
                self.begun = False
        if phase is Phase.TAKEN:
            self.steps_told = 0

    async def next_event(self) -> Event:
        """Raises the error that the job failed with."""
        event = await self.events.get()
        if isinstance(event, Exception):
            raise event
        return event
