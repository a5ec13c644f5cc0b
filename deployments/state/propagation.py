"""How a composition reaches every engine replica, and how the caller that changed it learns that it has.

Each replica long-polls for the composition that new jobs get, merges it and reports back; a poll is also its heartbeat.
Nothing is pushed, so a replica that starts late, restarts or was away just polls and is up to date.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from deployments.interfaces import Composition

POLL_SECONDS = 10.0
"""A poll is answered after this time even if there is no news."""

FORGET_SECONDS = 30.0
"""A replica that has not polled for this long, which is three polls, is no longer waited for."""


class MergeFailed(Exception):
    """Replicas could not merge the composition; the message says which and why."""


@dataclass
class Replica:
    """What is known about one engine replica."""

    last_seen: float
    """Monotonic seconds."""
    version: int | None = None
    """The version it reported last, merged or failed."""
    composition: Composition = ()
    """What is merged into its weights."""
    error: str | None = None
    num_bytes_held: int = 0
    """Host memory per rank that keeps the original weights."""


class Propagation:
    """The wanted composition with its version, and the replicas that follow it. Lives in one event loop."""

    def __init__(self, *, poll_seconds: float = POLL_SECONDS, forget_seconds: float = FORGET_SECONDS):
        self.poll_seconds = poll_seconds
        self.forget_seconds = forget_seconds
        self.composition: Composition = ()
        # From the clock, so that no version of an earlier process is mistaken for one of this process.
        self.version = time.time_ns()
        self._replicas: dict[str, Replica] = {}
        self._changed = asyncio.Condition()

    @property
    def replicas(self) -> Mapping[str, Replica]:
        """Those that polled recently."""
        oldest = time.monotonic() - self.forget_seconds
        self._replicas = {id_: replica for id_, replica in self._replicas.items() if replica.last_seen >= oldest}
        return self._replicas

    async def watch(self, replica_id: str, known_version: int | None) -> tuple[int, Composition]:
        """The wanted version and composition: at once if they are not what the replica knows, else when they change
        or after `poll_seconds`."""
        replica = self._seen(replica_id)
        async with self._changed:
            try:
                async with asyncio.timeout(self.poll_seconds):
                    await self._changed.wait_for(lambda: self.version != known_version)
            except TimeoutError:
                pass
        replica.last_seen = time.monotonic()
        return self.version, self.composition

    async def report(
        self, replica_id: str, version: int, composition: Composition, error: str | None, num_bytes_held: int = 0
    ) -> None:
        """A replica is done with `version`: `composition` is now in its weights, and `error` says what failed."""
        replica = self._seen(replica_id)
        replica.version, replica.composition, replica.error = version, composition, error
        replica.num_bytes_held = num_bytes_held
        await self._notify()

    async def publish(self, composition: Composition) -> None:
        """Make `composition` the wanted one and return at once."""
        self.composition = composition
        self.version += 1
        await self._notify()

    async def propagate(self, composition: Composition) -> None:
        """Publish, and return when every live replica has merged it: at once when there is none.

        Raises:
            MergeFailed: at least one could not.
        """
        await self.publish(composition)
        version = self.version
        async with self._changed:
            while any(replica.version != version for replica in self.replicas.values()):
                # Woken by a report; the timeout is for a replica that dies without one.
                try:
                    async with asyncio.timeout(self.poll_seconds):
                        await self._changed.wait()
                except TimeoutError:
                    pass
        failures = [f"{id_}: {replica.error}" for id_, replica in self.replicas.items() if replica.error is not None]
        if failures:
            raise MergeFailed("; ".join(failures))

    def _seen(self, replica_id: str) -> Replica:
        replica = self._replicas.setdefault(replica_id, Replica(last_seen=0.0))
        replica.last_seen = time.monotonic()
        return replica

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class Watched(Protocol):
    """The state actor as a replica sees it."""

    async def watch_default(self, replica_id: str, known_version: int | None) -> tuple[int, Composition]: ...

    async def report_merged(
        self, replica_id: str, version: int, composition: Composition, error: str | None, num_bytes_held: int = 0
    ) -> None: ...


@dataclass(frozen=True)
class Merged:
    """A replica's state after it tried to merge."""

    composition: Composition
    error: str | None = None
    num_bytes_held: int = 0


async def follow(state: Watched, replica_id: str, merge: Callable[[Composition], Awaitable[Merged]]) -> None:
    """The replica's side, as long as it lives: merge every new composition and report.

    `merge` may take long (it waits for the running job); meanwhile the replica keeps polling, so that it is waited for
    and not forgotten.
    """
    version: int | None = None
    while True:
        wanted, composition = await state.watch_default(replica_id, version)
        if wanted == version:
            continue
        version = wanted
        alive = asyncio.ensure_future(_stay_known(state, replica_id, version))
        try:
            merged = await merge(composition)
        finally:
            alive.cancel()
        await state.report_merged(replica_id, version, merged.composition, merged.error, merged.num_bytes_held)


async def _stay_known(state: Watched, replica_id: str, version: int) -> None:
    """Poll while a merge runs. A newer version waits for its turn; that of a restarted state actor must not end the
    polls."""
    while True:
        version, _ = await state.watch_default(replica_id, version)
