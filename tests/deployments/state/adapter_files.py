"""Adapters without a model: a loader that knows four paths."""

from __future__ import annotations

import asyncio

from deployments.errors import APIError
from deployments.interfaces import LoadedAdapter

SIZE = 100


class AdapterFiles:
    """Adapters by path, each with a version; any other path is refused as the engine refuses it."""

    def __init__(self) -> None:
        self.versions = dict.fromkeys("abcd", 1)
        self.loads: list[str] = []
        self.transformers = ("transformer", "transformer_2")

    async def identify_lora(self, path: str) -> str:
        await asyncio.sleep(0)
        if path not in self.versions:
            raise APIError(400, f"LoRA '{path}' does not exist", param="lora_path", code="invalid_lora")
        return f"{path}@{self.versions[path]}"

    async def load_lora(self, path: str) -> LoadedAdapter:
        identity = await self.identify_lora(path)
        self.loads.append(path)
        return LoadedAdapter(identity, f"factors of {identity}", 4, SIZE, self.transformers)
