"""Starting a gang, the first time and after each break: with retries, pauses between them, and a limit."""

from __future__ import annotations

import asyncio
import logging

from configs.model_family import ModelCard
from deployments.engine.gang import Gang, GangBroken

logger = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3
"""In a row. Then a first start is given up, and a replica that is rebuilding its gang reports itself unhealthy, so that
Serve replaces it."""


class Recovery:
    """Starts and restarts one gang, and counts how often in a row it failed to start."""

    def __init__(self, gang: Gang):
        self._gang = gang
        self._failed_starts = 0

    async def first_start(self) -> ModelCard:
        """Start the gang, retrying failures that may pass: Serve treats the first failure of a first replica as final.

        Raises:
            ValueError: the model cannot be loaded or sharded.
            GangBroken: `MAX_FAILED_STARTS` attempts failed.
        """
        while True:
            try:
                return await self._start()
            except GangBroken as broken:
                self._gang.kill()
                if self._failed_starts == MAX_FAILED_STARTS:
                    raise
                await self._pause(broken)

    async def rebuild(self) -> None:
        """Replace all ranks in the same placement group, retrying until it works or Serve replaces the replica."""
        while True:
            self._gang.kill()
            try:
                await self._start()
                return
            except (GangBroken, ValueError) as error:
                await self._pause(error)

    def check(self) -> None:
        """Raises `RuntimeError` when the gang has failed to start too often."""
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise RuntimeError(f"{self._failed_starts} starts of the gang failed in a row")

    async def _start(self) -> ModelCard:
        try:
            card = await self._gang.start()
        except (GangBroken, ValueError):
            self._failed_starts += 1
            raise
        self._failed_starts = 0
        return card

    async def _pause(self, error: Exception) -> None:
        logger.error("start %d of the gang failed: %s", self._failed_starts, error)
        await asyncio.sleep(min(30, 2**self._failed_starts))
