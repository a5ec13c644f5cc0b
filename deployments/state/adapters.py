"""Adapters by nickname: what is loaded, from which file, and where its factors are. No torch.

`deployments.state.default_lora` decides which of them new jobs get by default.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deployments.errors import APIError
from deployments.interfaces import AdapterLoader, Composition, LoadedAdapter, LoadedLoRA, LoRARequest
from lora.cache import LRUCache
from pipelines.job import LoRASpec

ALL = "all"
"""The target that means every transformer of the model."""


@dataclass(frozen=True)
class Adapter:
    """What is kept about an adapter after its factors are evicted."""

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
    """Nicknames, the files behind them, and a cache of their factors under a byte budget."""

    def __init__(self, loader: Callable[[], AdapterLoader], *, cache_bytes: int):
        self._loader = loader
        self._cache: LRUCache[str, LoadedAdapter] = LRUCache(cache_bytes, lambda loaded: loaded.num_bytes)
        self._adapters: dict[str, Adapter] = {}
        """By identity. An adapter outlives its nickname, because accepted jobs refer to it by identity."""
        self._nicknames: dict[str, Named] = {}
        self._loading = asyncio.Lock()
        """One load at a time: a caller that waited for the same adapter finds it cached."""
        self.changes = 0
        """Number of changes to anything that belongs in a snapshot."""

    # From a client's request to a job's adapters.

    async def for_job(self, requests: Sequence[LoRARequest]) -> tuple[LoRASpec, ...]:
        """The adapters that a job itself requests, loaded if necessary.

        A nickname without a path means the weights that were loaded under it.

        Raises:
            APIError: 404 for an unknown nickname without a path; 409 for a known one with a different path; 400 for a
                bad adapter.
        """
        self.demand_distinct(requests)
        specs = []
        for request in requests:
            named = self._nicknames.get(request.nickname)
            if named is None or request.path is not None:
                self.demand_same_path(request)
                named = await self.find(request)
                if request.nickname not in self._nicknames:
                    self.name({request.nickname: named})
            specs.append(spec_of(request, named))
        return tuple(specs)

    async def find(self, request: LoRARequest) -> Named:
        """The adapter now at the request's path, or at its nickname's path; loaded unless that very one is cached.

        Raises:
            APIError: 404 for an unknown nickname without a path; 400 for a bad adapter.
        """
        path = request.path
        if path is None:
            if request.nickname not in self._nicknames:
                raise unknown(request.nickname)
            path = self._nicknames[request.nickname].path
        async with self._loading:
            identity = await self._loader().identify_lora(path)
            if identity not in self._adapters or identity not in self._cache:
                identity = (await self._load(path)).identity
        return Named(path, identity)

    async def factors(self, identity: str) -> Any:
        """The factors of an adapter, loaded again if they were evicted.

        Raises:
            APIError: 404 for an identity that was never loaded; 409 when its file has changed since; 400 when the file
                is gone.
        """
        cached = self._cache.get(identity)
        if cached is not None:
            return cached.factors
        adapter = self._adapters.get(identity)
        if adapter is None:
            raise APIError(404, "This LoRA adapter has never been loaded.", code="lora_not_found")
        async with self._loading:
            loaded = self._cache.get(identity) or await self._load(adapter.path)
        if loaded.identity != identity:
            raise APIError(
                409,
                f"LoRA '{adapter.path}' has changed since it was loaded, and its old weights are no longer held. "
                "POST /v1/set_lora loads it again.",
                code="lora_changed",
            )
        return loaded.factors

    async def _load(self, path: str) -> LoadedAdapter:
        """Load and remember; the caller holds `_loading`."""
        loaded = await self._loader().load_lora(path)
        adapter = Adapter(path, loaded.identity, loaded.rank, loaded.num_bytes, loaded.transformers)
        self._adapters[loaded.identity] = adapter
        self._cache.put(loaded.identity, loaded)
        self.changes += 1
        return loaded

    # Nicknames.

    def name(self, named: Mapping[str, Named]) -> None:
        """Make nicknames stand for these from now on."""
        if not named.items() <= self._nicknames.items():
            self._nicknames |= named
            self.changes += 1

    def named(self, nickname: str) -> Named | None:
        return self._nicknames.get(nickname)

    def forget(self, nickname: str) -> None:
        """Free a nickname, and its factors unless another nickname uses them. Raises `APIError` 404."""
        if nickname not in self._nicknames:
            raise unknown(nickname)
        identity = self._nicknames.pop(nickname).identity
        if all(named.identity != identity for named in self._nicknames.values()):
            self._cache.discard(identity)
        self.changes += 1

    def demand_distinct(self, requests: Sequence[LoRARequest]) -> None:
        """Raises `APIError` 400 for a nickname that is given twice."""
        names = [request.nickname for request in requests]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise APIError(
                400, f"LoRA nickname '{twice}' is given twice.", param="lora_nickname", code="duplicate_lora"
            )

    def demand_same_path(self, request: LoRARequest) -> None:
        """Raises `APIError` 409 for a nickname that is in use with a different path."""
        named = self._nicknames.get(request.nickname)
        if named is not None and request.path not in (None, named.path):
            raise APIError(
                409,
                f"LoRA nickname '{request.nickname}' stands for another lora_path. Choose another nickname, or free "
                f"this one: POST /v1/unmerge_lora_weights if it is merged, then DELETE /v1/loras/{request.nickname}.",
                param="lora_nickname",
                code="lora_nickname_in_use",
            )

    # What is known about loaded adapters.

    @property
    def loaded(self) -> tuple[LoadedLoRA, ...]:
        """Every nickname with its adapter, whether or not the factors are still cached."""
        known = [(nickname, named, self._adapters[named.identity]) for nickname, named in self._nicknames.items()]
        return tuple(LoadedLoRA(nickname, named.path, a.num_bytes, a.rank) for nickname, named, a in known)

    def transformers_of(self, spec: LoRASpec) -> tuple[str, ...]:
        """The transformers whose weights the spec changes."""
        has = self._adapters[spec.identity].transformers
        return has if ALL in spec.target else tuple(name for name in has if name in spec.target)

    def ignored_targets(self, spec: LoRASpec) -> list[str]:
        """Notes for the client about targets that have no effect."""
        has = self._adapters[spec.identity].transformers
        return [
            f"target '{target}' is ignored: there is only {', '.join(has)}"
            for target in spec.target
            if target not in (ALL, *has)
        ]

    def pin(self, composition: Composition) -> None:
        """Exempt exactly these from eviction, whatever the budget."""
        self._cache.pin({spec.identity for spec in composition})

    # What survives a restart.

    def snapshot(self, in_use: Collection[str]) -> dict[str, Any]:
        """All but the factors themselves, as JSON: the nicknames, and the adapters that a nickname or `in_use` (the
        identities in jobs and compositions) refers to. Other adapters are forgotten with this process."""
        in_use = {*in_use, *(named.identity for named in self._nicknames.values())}
        return {
            "adapters": [asdict(adapter) for identity, adapter in self._adapters.items() if identity in in_use],
            "nicknames": {nickname: asdict(named) for nickname, named in self._nicknames.items()},
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Restore what `snapshot` returned; factors are loaded on demand."""
        adapters = [Adapter(**{**a, "transformers": tuple(a["transformers"])}) for a in snapshot["adapters"]]
        self._adapters = {adapter.identity: adapter for adapter in adapters}
        self._nicknames = {nickname: Named(**named) for nickname, named in snapshot["nicknames"].items()}


def spec_of(request: LoRARequest, named: Named) -> LoRASpec:
    return LoRASpec(
        nickname=request.nickname, identity=named.identity, strength=request.strength, target=request.target
    )


def unknown(nickname: str) -> APIError:
    return APIError(
        404,
        f"LoRA nickname '{nickname}' is not known. The first time it is used, its path is needed.",
        param="lora_nickname",
        code="lora_not_found",
    )
