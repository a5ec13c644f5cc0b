"""How long finished work is kept: until it is too old, or until newer work needs its room."""

from __future__ import annotations

import asyncio
import logging

from deployments.state.content import ContentStore
from deployments.state.records import Records

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
"""Interval between checks: how much longer than promised a file may be kept. Checking for what is too old takes
microseconds; what is stored is added up only after something has finished."""


class Retention:
    """Deletes finished videos and stored images, records and files together. Unfinished videos always stay."""

    def __init__(self, records: Records, content: ContentStore, *, ttl_s: float | None, max_bytes: int | None):
        """None means no limit of age, or of size."""
        self._records = records
        self._content = content
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._num_finished = -1
        """What `Records.num_finished` was when stored files were last added up."""

    async def enforce(self) -> None:
        """Check forever, first at once: time has passed while no server ran."""
        while True:
            try:
                await self._look()
            except Exception:  # a full disk, say: all the more reason to continue
                logger.exception("retention failed and will be tried again")
            await asyncio.sleep(PERIOD_S)

    async def _look(self) -> None:
        if self._ttl_s is not None:
            await self._discard(self._records.finished.remove_older_than(self._ttl_s), "too old")
        if self._max_bytes is not None and self._num_finished != self._records.num_finished:
            num_finished = self._records.num_finished
            await self._discard(self._records.finished.remove_oldest_beyond(self._max_bytes), "too much is stored")
            self._num_finished = num_finished

    async def _discard(self, files: list[str], reason: str) -> None:
        if files:
            logger.info("%d files are deleted: %s", len(files), reason)
            await self._content.discard(files)
