"""Adapters by nickname: what is loaded, what new jobs get by default, and the rules for changing it. No torch.

A job carries its adapters in itself, so nothing here decides what an accepted job computes. `set_lora` and the like
change the default of new jobs, once every replica has it in its weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from deployments.errors import APIError
from deployments.interfaces import LoadedLoRA, LoRARequest, LoRAStatus
from deployments.propagation import Composition, MergeFailed, Propagation
from lora.cache import LRUCache
from pipelines.job import LoRASpec

ALL = "all"
"""The target that means every transformer of the model."""


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that an engine replica has read, converted and found to fit the model."""

    identity: str
    blob: bytes
    """`lora.factors.Factors.to_bytes()`."""
    rank: int
    num_bytes: int
    transformers: tuple[str, ...] = ("transformer",)
    """The model's transformers that it has factors for."""


class AdapterLoader(Protocol):
    """Reads adapters where the model is. Both raise `APIError` 400 (code `invalid_lora`) for one that can't be used."""

    async def identify_lora(self, path: str) -> str:
        """The identity of what lies there now, without loading it."""

    async def load_lora(self, path: str) -> LoadedAdapter: ...


@dataclass(frozen=True)
class Adapter:
    """What stays known of an adapter when its factors are evicted."""

    path: str
    identity: str
    rank: int
    num_bytes: int
    transformers: tuple[str, ...]


@dataclass(frozen=True)
class Named:
    """What a nickname stands for."""

    path: str
    identity: str


class AdapterRegistry:
    """The LoRA half of `deployments.interfaces.State`, and what engine replicas ask it."""

    def __init__(
        self,
        loader: Callable[[], AdapterLoader],
        *,
        cache_bytes: int,
        switch: Literal["refuse", "auto"] = "refuse",
        propagation: Propagation | None = None,
    ):
        self._loader = loader
        self._switch = switch
        self._propagation = propagation or Propagation()
        self._cache: LRUCache[str, bytes] = LRUCache(cache_bytes, len)
        self._adapters: dict[str, Adapter] = {}
        """By identity. An adapter outlives its nickname: accepted jobs name it by identity."""
        self._nicknames: dict[str, Named] = {}
        self._set: Composition = ()
        self._default: Composition = ()
        self._changing = asyncio.Lock()
        self._loading = asyncio.Lock()
        """One load at a time: whoever waited finds the adapter in the cache."""

    # What clients ask for.

    async def set_lora(self, requests: Sequence[LoRARequest]) -> LoRAStatus:
        """Load a composition, merge it on every replica and make it the default; see `State.set_lora`.

        The composition that is merged already may be set again, with other strengths and targets too: it is the same
        adapters.

        Raises:
            APIError: 404 for an unknown nickname without a path; 409 while other adapters are merged, or when a
                nickname stands for another path; 400 for a bad adapter; 500 when a replica fails to merge. What was
                merged before is merged still.
        """
        async with self._changing:
            self._demand_distinct(requests)
            self._demand_free(requests)
            notes: list[str] = []
            named: dict[str, Named] = {}
            composition: Composition = ()
            try:
                for request in requests:
                    named[request.nickname] = await self._find(request, notes)
                    composition += (_spec(request, named[request.nickname]),)
                    self._pin(self._default + composition)
                await self._make_default(composition)
            finally:
                self._pin(self._default)
            self._set = composition
            self._nicknames |= named
            return self._status([*notes, *self._ignored_targets(composition)])

    async def merge_lora(self, strength: float | None = None, target: tuple[str, ...] | None = None) -> LoRAStatus:
        """Make what was set last the default again, as it was set save for what is given here.

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
            await self._make_default(tuple(spec.model_copy(update=given) for spec in self._set))
            return self._status()

    async def unmerge_lora(self, target: tuple[str, ...] | None = None) -> LoRAStatus:
        """Give new jobs the base model, or, with `target`, take the adapters out of those transformers alone."""
        async with self._changing:
            taken = {ALL} if target is None else set(target)
            kept = [] if ALL in taken else [(spec, self._transformers_of(spec) - taken) for spec in self._default]
            composition = tuple(
                # Untouched specs stay as they are, so that unmerging what is not there changes nothing.
                spec if left == self._transformers_of(spec) else spec.model_copy(update={"target": tuple(sorted(left))})
                for spec, left in kept
                if left
            )
            await self._make_default(composition)
            return self._status()

    async def delete_lora(self, nickname: str) -> LoRAStatus:
        """Forget a nickname and free its factors.

        Raises:
            APIError: 404 when it is not known; 409 while it is merged.
        """
        async with self._changing:
            if nickname not in self._nicknames:
                raise _unknown(nickname)
            if nickname in _names(self._default):
                raise self._merged_conflict()
            identity = self._nicknames.pop(nickname).identity
            if nickname in _names(self._set):
                self._set = ()
            if all(named.identity != identity for named in self._nicknames.values()):
                self._cache.discard(identity)
            return self._status()

    async def list_loras(self) -> LoRAStatus:
        return self._status()

    async def lora_for_job(self, requests: Sequence[LoRARequest] | None) -> tuple[LoRASpec, ...]:
        """What a new job runs with: the default (None), or what it asks for, loaded if need be.

        A nickname alone means the weights that were loaded under it. Waits for no other call that changes the default.

        Raises:
            APIError: 404 for an unknown nickname without a path; 409 for a known one with another path; 400 for a bad
                adapter.
        """
        if requests is None:
            return self._default
        self._demand_distinct(requests)
        specs = []
        for request in requests:
            named = self._nicknames.get(request.nickname)
            if named is None or request.path is not None:
                self._demand_same_path(request)
                named = await self._find(request, [])
                self._nicknames.setdefault(request.nickname, named)
            specs.append(_spec(request, named))
        return tuple(specs)

    # What engine replicas ask for.

    async def factors(self, identity: str) -> bytes:
        """The factors of an adapter, loaded again if they were evicted.

        Raises:
            APIError: 404 for an identity that was never loaded; 409 when its file has changed since; 400 when it is
                gone.
        """
        blob = self._cache.get(identity)
        if blob is not None:
            return blob
        adapter = self._adapters.get(identity)
        if adapter is None:
            raise APIError(404, "This LoRA adapter has never been loaded.", code="lora_not_found")
        async with self._loading:
            loaded = await self._load(adapter.path)
        if loaded.identity != identity:
            raise APIError(
                409,
                f"LoRA '{adapter.path}' has changed since the job was accepted; its old weights are no longer held.",
                code="lora_changed",
            )
        return loaded.blob

    async def watch_default(self, replica_id: str, known_version: int | None) -> tuple[int, Composition]:
        """See `Propagation.watch`."""
        return await self._propagation.watch(replica_id, known_version)

    async def report_merged(
        self, replica_id: str, version: int, composition: Composition, error: str | None, num_bytes_held: int = 0
    ) -> None:
        """See `Propagation.report`."""
        await self._propagation.report(replica_id, version, composition, error, num_bytes_held)

    # What survives a restart.

    def snapshot(self) -> dict[str, Any]:
        """All but the factors themselves, as JSON."""
        return {
            "adapters": [asdict(adapter) for adapter in self._adapters.values()],
            "nicknames": {nickname: asdict(named) for nickname, named in self._nicknames.items()},
            "set": [spec.model_dump(mode="json") for spec in self._set],
            "default": [spec.model_dump(mode="json") for spec in self._default],
        }

    async def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take up where `snapshot` left off; factors are loaded when a replica asks for them."""
        adapters = [Adapter(**{**a, "transformers": tuple(a["transformers"])}) for a in snapshot["adapters"]]
        self._adapters = {adapter.identity: adapter for adapter in adapters}
        self._nicknames = {nickname: Named(**named) for nickname, named in snapshot["nicknames"].items()}
        self._set = tuple(LoRASpec.model_validate(spec) for spec in snapshot["set"])
        self._default = tuple(LoRASpec.model_validate(spec) for spec in snapshot["default"])
        self._pin(self._default)
        await self._propagation.publish(self._default)

    # Rules.

    def _demand_distinct(self, requests: Sequence[LoRARequest]) -> None:
        names = [request.nickname for request in requests]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise APIError(
                400, f"LoRA nickname '{twice}' is given twice.", param="lora_nickname", code="duplicate_lora"
            )

    def _demand_free(self, requests: Sequence[LoRARequest]) -> None:
        """Refuse to replace merged adapters by others, unless switching is automatic."""
        if self._switch == "auto" or not self._default:
            return
        if {request.nickname for request in requests} != _names(self._default):
            raise self._merged_conflict()
        for request in requests:
            self._demand_same_path(request)

    def _merged_conflict(self) -> APIError:
        names = " and ".join(f"'{spec.nickname}'" for spec in self._default)
        return APIError(
            409,
            f"LoRA {names} is merged. Call POST /v1/unmerge_lora_weights first.",
            code="lora_merged",
            headers={"x-should-retry": "false"},
        )

    def _demand_same_path(self, request: LoRARequest) -> None:
        """Refuse to point a nickname that is in use elsewhere."""
        named = self._nicknames.get(request.nickname)
        if named is not None and request.path not in (None, named.path):
            raise APIError(
                409,
                f"LoRA nickname '{request.nickname}' stands for another lora_path. Choose another nickname, or call "
                "POST /v1/unmerge_lora_weights and then POST /v1/set_lora with the new path.",
                param="lora_nickname",
                code="lora_nickname_in_use",
                headers={"x-should-retry": "false"},
            )

    # Loading and merging.

    async def _find(self, request: LoRARequest, notes: list[str]) -> Named:
        """What lies at the request's path now, loaded unless the cache has just that."""
        before = self._nicknames.get(request.nickname)
        path = request.path
        if path is None:
            if before is None:
                raise _unknown(request.nickname)
            path = before.path
        async with self._loading:
            identity = await self._loader().identify_lora(path)
            if identity not in self._adapters or identity not in self._cache:
                identity = (await self._load(path)).identity
        if before is not None and before.path == path and before.identity != identity:
            notes.append(f"the file of '{request.nickname}' has changed and was loaded again")
        return Named(path, identity)

    async def _load(self, path: str) -> LoadedAdapter:
        """Load and remember; the caller holds `_loading`."""
        loaded = await self._loader().load_lora(path)
        self._adapters[loaded.identity] = Adapter(
            path, loaded.identity, loaded.rank, loaded.num_bytes, loaded.transformers
        )
        self._cache.put(loaded.identity, loaded.blob)
        return loaded

    async def _make_default(self, composition: Composition) -> None:
        """Have every replica merge it, then give it to new jobs; on failure everything is as it was."""
        previous = self._default
        if composition == previous:
            return
        self._pin(previous + composition)
        try:
            await self._propagation.propagate(composition)
            self._default = composition
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
            self._pin(self._default)

    def _pin(self, composition: Composition) -> None:
        self._cache.pin({spec.identity for spec in composition})

    def _transformers_of(self, spec: LoRASpec) -> set[str]:
        has = set(self._adapters[spec.identity].transformers)
        return has if ALL in spec.target else has & set(spec.target)

    def _ignored_targets(self, composition: Composition) -> list[str]:
        """For the client: the targets that come to nothing."""
        return [
            f"target '{target}' is ignored: there is only {', '.join(has)}"
            for spec in composition
            for target in spec.target
            if target not in (ALL, *(has := self._adapters[spec.identity].transformers))
        ]

    def _status(self, notes: Sequence[str] = ()) -> LoRAStatus:
        loaded = [(nickname, named, self._adapters[named.identity]) for nickname, named in self._nicknames.items()]
        replicas = self._propagation.replicas
        return LoRAStatus(
            loaded=tuple(LoadedLoRA(nickname, named.path, a.num_bytes, a.rank) for nickname, named, a in loaded),
            set=self._set,
            merged=bool(self._default),
            replicas={id_: replica.composition for id_, replica in replicas.items()},
            num_bytes_held={id_: replica.num_bytes_held for id_, replica in replicas.items()},
            notes=tuple(notes),
        )


def _spec(request: LoRARequest, named: Named) -> LoRASpec:
    return LoRASpec(
        nickname=request.nickname, identity=named.identity, strength=request.strength, target=request.target
    )


def _names(composition: Composition) -> set[str]:
    return {spec.nickname for spec in composition}


def _unknown(nickname: str) -> APIError:
    return APIError(
        404,
        f"LoRA nickname '{nickname}' is not known. The first time it is used, lora_path is needed.",
        param="lora_nickname",
        code="lora_not_found",
    )
