"""Which of the waiting jobs gets the gang next: a rule that needs no clock, task or gang.

Images, for which a client is waiting, go before videos, which clients ask about later. Among equals, jobs whose
adapters are already merged go before those that need a switch; else the oldest goes first.

No job starves: one that was overtaken `MAX_OVERTAKEN` times is next, whatever else waits. For a video that gives way to
images, the count restarts with each of its turns, and a turn is at least one denoising step.
"""

from __future__ import annotations

from collections.abc import Iterator

from deployments.engine.ticket import Phase, Ticket
from deployments.interfaces import Composition

MAX_OVERTAKEN = 16
"""How many turns of later jobs a job lets pass. Twenty images over four adapters, in any order of arrival, then cost
one switch per adapter: the last adapter's images let the fifteen others pass. With a limit of eight there were up to
nine switches. A video behind endless images does a step after every sixteen."""


class Full(Exception):
    """No further image may wait."""


class Schedule:
    """The waiting jobs, in order of arrival."""

    def __init__(self, max_images: int, *, preemption: bool = True):
        """At most `max_images` images may wait. Videos are bounded where they are accepted."""
        self._max_images = max_images
        self._preemption = preemption
        self._waiting: list[Ticket] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._waiting)

    def add(self, ticket: Ticket) -> None:
        """Raises `Full` when too many images wait already."""
        if not ticket.is_video and len(self._images()) >= self._max_images:
            raise Full
        self._waiting.append(ticket)

    def remove(self, ticket: Ticket) -> None:
        self._waiting.remove(ticket)

    def give_back(self, ticket: Ticket) -> None:
        """Take back a job that gave way, at the head of the queue. No second video begins meanwhile."""
        ticket.become(Phase.SUSPENDED)
        self._waiting.insert(0, ticket)

    def put_back(self, ticket: Ticket) -> None:
        """Take back a job that must restart, at the head of the queue."""
        ticket.become(Phase.WAITING)
        self._waiting.insert(0, ticket)

    def forget_latents(self) -> None:
        """The ranks were replaced: suspended jobs restart from their first step."""
        for ticket in self._waiting:
            if ticket.is_held_by_ranks:
                ticket.become(Phase.WAITING)

    def take(self, merged: Composition) -> Ticket:
        """The next job; there must be one. `merged` are the adapters in the weights now."""
        begun = any(ticket.is_held_by_ranks for ticket in self._waiting)
        eligible = [ticket for ticket in self._waiting if ticket.is_held_by_ranks or not (ticket.is_video and begun)]
        overdue = [ticket for ticket in eligible if ticket.overtaken >= MAX_OVERTAKEN]
        # min returns the first of equals, and the list is in order of arrival.
        chosen = overdue[0] if overdue else min(eligible, key=lambda each: (each.is_video, each.job.lora != merged))
        for older in self._waiting[: self._waiting.index(chosen)]:
            older.overtaken += 1
        self._waiting.remove(chosen)
        chosen.overtaken = 0
        chosen.become(Phase.RESUMING if chosen.is_held_by_ranks else Phase.TAKEN)
        return chosen

    def may_give_way(self, running: Ticket) -> bool:
        """Whether a running job can be put aside between two steps."""
        return self._preemption and running.is_video

    def should_give_way(self, running: Ticket) -> bool:
        """Whether a running job should leave the gang to an image at the end of its step."""
        return self.may_give_way(running) and bool(self._images())

    def _images(self) -> list[Ticket]:
        return [ticket for ticket in self._waiting if not ticket.is_video]
