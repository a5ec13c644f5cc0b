"""The composition that new jobs get by default, and the rules for changing it. No torch.

A job carries its own adapters, so nothing here changes what an accepted job computes. `set_lora` and the like change
the default for new jobs, once every replica has merged it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from deployments.errors import APIError
from deployments.interfaces import ActiveLoRA, Composition, LoRARequest, LoRAStatus
from deployments.state.adapters import ALL, AdapterRegistry, Named, spec_of
from deployments.state.propagation import MergeFailed, Propagation
from pipelines.job import LoRASpec

logger = logging.getLogger(__name__)


class DefaultLoRA:
    """What was set, whether it is merged, and how it reaches the replicas. Changes run one at a time."""

    def __init__(
        self,
        adapters: AdapterRegistry,
        *,
        switch: Literal["refuse", "auto"] = "refuse",
        propagation: Propagation | None = None,
    ):
        self.composition: Composition = ()
        """What new jobs get: empty, what was set, or a part of it."""
        self._adapters = adapters
        self._switch = switch
        self._propagation = propagation or Propagation()
        self._set: Composition = ()
        self._changing = asyncio.Lock()

    # What clients ask for.

    async def set_lora(self, requests: Sequence[LoRARequest]) -> LoRAStatus:
        """Load a composition, merge it on every replica and make it the default; see `State.set_lora`.

        Adapters that are already merged may be set again, also with other strengths and targets.

        Raises:
            APIError: 404 for an unknown nickname without a path; 409 while other adapters are merged, or when a
                nickname stands for another path; 400 for a bad adapter; 500 when a replica fails to merge. What was
                merged before stays merged.
        """
        async with self._changing:
            self._adapters.demand_distinct(requests)
            self._demand_free(requests)
            notes: list[str] = []
            named: dict[str, Named] = {}
            composition: Composition = ()
            try:
                for request in requests:
                    now, before = await self._adapters.find(request), self._adapters.named(request.nickname)
                    if before is not None and before.path == now.path and before != now:
                        notes.append(f"the file of '{request.nickname}' has changed and was loaded again")
                    named[request.nickname] = now
                    composition += (spec_of(request, now),)
                    self._adapters.pin(self.composition + composition)
                await self._merge(composition)
            finally:
                self._adapters.pin(self.composition)
            self._set = composition
            self._adapters.name(named)
            return self.status(
                [*notes, *(note for spec in composition for note in self._adapters.ignored_targets(spec))]
            )

    async def merge_lora(self, strength: float | None = None, target: tuple[str, ...] | None = None) -> LoRAStatus:
        """Make the composition set last the default again, unchanged except for what is given here.

        Raises:
            APIError: 400 when nothing has been set; 500 when a replica fails to merge.
        """
        async with self._changing:
            if not self._set:
                raise APIError(
                    400, "No LoRA adapter has been set yet. Call POST /v1/set_lora first.", code="no_lora_set"
                )
            changes = {"strength": strength, "target": target}
            given = {name: value for name, value in changes.items() if value is not None}
            await self._merge(tuple(spec.model_copy(update=given) for spec in self._set))
            return self.status()

    async def unmerge_lora(self, target: tuple[str, ...] | None = None) -> LoRAStatus:
        """Give new jobs the base model or, with `target`, remove the adapters from those transformers only."""
        async with self._changing:
            taken = {ALL} if target is None else {*target}
            await self._merge(() if ALL in taken else tuple(self._without(taken)))
            return self.status()

    def _without(self, transformers: set[str]) -> list[LoRASpec]:
        """The default without its part in these transformers. A spec with no part in them stays as it is, so that
        unmerging what is not there changes nothing."""
        kept = []
        for spec in self.composition:
            has = self._adapters.transformers_of(spec)
            left = tuple(name for name in has if name not in transformers)
            if left:
                kept.append(spec if left == has else spec.model_copy(update={"target": left}))
        return kept

    async def delete_lora(self, nickname: str) -> LoRAStatus:
        """Forget a nickname and free its factors. A composition that was set with it can't be merged again.

        Raises:
            APIError: 404 when it is not known; 409 while it is merged.
        """
        async with self._changing:
            if nickname in _names(self.composition):
                raise self._merged_conflict()
            self._adapters.forget(nickname)
            if nickname in _names(self._set):
                self._set = ()
            return self.status()

    def status(self, notes: Sequence[str] = ()) -> LoRAStatus:
        replicas = self._propagation.replicas
        merged = self._by_transformer(self.composition)
        return LoRAStatus(
            loaded=self._adapters.loaded,
            default=self.composition,
            active={
                transformer: ActiveLoRA(adapters, merged=transformer in merged)
                for transformer, adapters in (self._by_transformer(self._set) | merged).items()
            },
            replicas={id_: replica.composition for id_, replica in replicas.items()},
            num_bytes_held={id_: replica.num_bytes_held for id_, replica in replicas.items()},
            notes=tuple(notes),
        )

    def _by_transformer(self, composition: Composition) -> dict[str, Composition]:
        parts: dict[str, Composition] = {}
        for spec in composition:
            for transformer in self._adapters.transformers_of(spec):
                parts[transformer] = (*parts.get(transformer, ()), spec)
        return parts

    # What engine replicas ask for.

    @property
    def num_replicas(self) -> int:
        """How many replicas polled recently."""
        return len(self._propagation.replicas)

    async def watch_default(self, replica_id: str, known_version: int | None) -> tuple[int, Composition]:
        """See `Propagation.watch`."""
        return await self._propagation.watch(replica_id, known_version)

    async def report_merged(
        self, replica_id: str, version: int, composition: Composition, error: str | None, num_bytes_held: int = 0
    ) -> None:
        """See `Propagation.report`."""
        await self._propagation.report(replica_id, version, composition, error, num_bytes_held)

    # What survives a restart.

    @property
    def identities(self) -> set[str]:
        """Identities of the adapters that are merged or can be merged again."""
        return {spec.identity for spec in (*self._set, *self.composition)}

    def snapshot(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "set": [spec.model_dump(mode="json") for spec in self._set],
            "default": [spec.model_dump(mode="json") for spec in self.composition],
        }

    async def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Restore what `snapshot` returned. The registry must be restored first."""
        self._set = tuple(LoRASpec.model_validate(spec) for spec in snapshot["set"])
        self.composition = tuple(LoRASpec.model_validate(spec) for spec in snapshot["default"])
        self._adapters.pin(self.composition)
        await self._propagation.publish(self.composition)

    async def reload(self) -> None:
        """Read the adapters from their files as they are now, since what was read before a restart is no longer held.
        If one cannot be read, all stay as they are, and jobs that get it fail.

        Raises:
            APIError: 503; no engine can read adapters yet.
        """
        restored = (self._set, self.composition)
        try:
            # Outside the lock: an engine that has yet to start must not keep clients from changing the default.
            nicknames = _names(self._set) | _names(self.composition)
            now = {nickname: await self._adapters.find(LoRARequest(nickname)) for nickname in nicknames}
            async with self._changing:
                if restored == (self._set, self.composition):
                    await self._merge(_renewed(self.composition, now))
                    self._set = _renewed(self._set, now)
                    self._adapters.name(now)
        except APIError as error:
            if error.status == 503:
                raise
            logger.warning("the default adapter cannot be loaded again: %s", error)

    # Rules and their execution.

    def _demand_free(self, requests: Sequence[LoRARequest]) -> None:
        """Refuse to replace merged adapters with others, unless switching is automatic."""
        if self._switch == "auto" or not self.composition:
            return
        if {request.nickname for request in requests} != _names(self.composition):
            raise self._merged_conflict()
        for request in requests:
            self._adapters.demand_same_path(request)

    def _merged_conflict(self) -> APIError:
        names = " and ".join(f"'{spec.nickname}'" for spec in self.composition)
        return APIError(
            409,
            f"LoRA {names} is merged. Call POST /v1/unmerge_lora_weights first.",
            code="lora_merged",
        )

    async def _merge(self, composition: Composition) -> None:
        """Have every replica merge the composition, then make it the default; on failure restore the previous one."""
        previous = self.composition
        if composition == previous:
            return
        self._adapters.pin(previous + composition)
        try:
            await self._propagation.propagate(composition)
            self.composition = composition
        except MergeFailed as failure:
            message = f"LoRA {' and '.join(map(repr, sorted(_names(composition))))} could not be merged: {failure}"
            try:
                await self._propagation.propagate(previous)
            except MergeFailed as again:
                message += f"; what was merged before could not be merged again either: {again}"
            raise APIError(500, message, code="lora_merge_failed") from None
        except asyncio.CancelledError:
            await self._propagation.publish(previous)
            raise
        finally:
            self._adapters.pin(self.composition)


def _renewed(composition: Composition, now: Mapping[str, Named]) -> Composition:
    """The composition with the adapters that its nicknames stand for now."""
    return tuple(spec.model_copy(update={"identity": now[spec.nickname].identity}) for spec in composition)


def _names(composition: Composition) -> set[str]:
    return {spec.nickname for spec in composition}
