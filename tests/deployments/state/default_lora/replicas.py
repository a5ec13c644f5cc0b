"""The default adapter, with engine replicas that are tasks of this event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal

from deployments.interfaces import Composition, LoRARequest, LoRAStatus
from deployments.state.adapters import AdapterRegistry
from deployments.state.default_lora import DefaultLoRA
from deployments.state.propagation import Merged, Propagation, follow
from tests.deployments.state.adapter_files import SIZE, AdapterFiles


class EngineReplica:
    """Follows the default adapter as an engine replica does; its weights are just the composition."""

    def __init__(self, registry: AdapterRegistry, default: DefaultLoRA, name: str):
        self.registry = registry
        self.weights: Composition = ()
        self.merges: list[Composition] = []
        self.fails_on: set[str] = set()
        self.busy = asyncio.Event()
        self.busy.set()
        self.task = asyncio.create_task(follow(default, name, self.merge))

    async def merge(self, composition: Composition) -> Merged:
        await self.busy.wait()
        for spec in composition:
            assert await self.registry.factors(spec.identity) == f"factors of {spec.identity}"
        if failing := self.fails_on & {spec.nickname for spec in composition}:
            return Merged(self.weights, f"no memory for {failing.pop()}")
        self.weights = composition
        self.merges.append(composition)
        return Merged(composition, num_bytes_held=7 * len(composition))

    async def die(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0)


class Server:
    """A registry, a default and its replicas, with short intervals for tests."""

    def __init__(self, switch: Literal["refuse", "auto"] = "refuse", cache_bytes: int = 10 * SIZE):
        self.files = AdapterFiles()
        self.propagation = Propagation(poll_seconds=0.02, forget_seconds=0.1)
        self.registry = AdapterRegistry(lambda: self.files, cache_bytes=cache_bytes)
        self.default = DefaultLoRA(self.registry, switch=switch, propagation=self.propagation)
        self.replicas: list[EngineReplica] = []

    async def start(self, count: int) -> None:
        self.replicas += [EngineReplica(self.registry, self.default, f"replica-{i}") for i in range(count)]
        await until(lambda: len(self.propagation.replicas) == len(self.replicas))

    async def set(self, nickname: str, path: str | None = None, strength: float = 1.0) -> LoRAStatus:
        return await self.default.set_lora([LoRARequest(nickname, path, strength)])

    def job(self) -> list[tuple[str, str, float]]:
        """The adapters of a new job that names none."""
        return [(spec.nickname, spec.identity, spec.strength) for spec in self.default.composition]

    async def restarted(self) -> Server:
        later = Server()
        snapshot = {**self.registry.snapshot(self.default.identities), **self.default.snapshot()}
        snapshot = json.loads(json.dumps(snapshot))
        later.registry.restore(snapshot)
        await later.default.restore(snapshot)
        return later


def nicknames(composition: Sequence) -> list[str]:
    return [spec.nickname for spec in composition]


def merged(status: LoRAStatus) -> list[str]:
    """The transformers in which new jobs get an adapter."""
    return [transformer for transformer, active in status.active.items() if active.merged]
