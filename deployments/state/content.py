"""Stored content: which files a job has, under which keys, written and deleted so that files and records agree."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import ParamSpec, TypeVar

from deployments.errors import APIError
from deployments.interfaces import Content, Variant
from deployments.state.files import FileRecords
from deployments.state.images import ImageRecords
from deployments.state.storage import Storage
from pipelines.job import Output

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

_VARIANTS: Mapping[Variant, tuple[str, str]] = {
    "video": ("mp4", "video/mp4"),
    "thumbnail": ("webp", "image/webp"),
    "spritesheet": ("jpg", "image/jpeg"),
}
"""File extension and media type."""


def input_key(video_id: str, content_key: str) -> str:
    """Inputs are kept per job, not shared by content, so that a job can delete its own without knowing of others."""
    return f"inputs/{video_id}-{content_key}"


def image_key(image_id: str, index: int, output_format: str) -> str:
    return f"images/{image_id}-{index}.{output_format}"


def video_key(video_id: str, index: int, variant: Variant) -> str:
    return f"videos/{video_id}-{index}.{_VARIANTS[variant][0]}"


def video_files(video_id: str, outputs: Collection[Output]) -> dict[str, bytes]:
    """The files of a finished video by key."""
    files: dict[str, bytes] = {}
    for index, output in enumerate(outputs):
        variants: dict[Variant, bytes | None] = {
            "video": output.data,
            "thumbnail": output.thumbnail,
            "spritesheet": output.spritesheet,
        }
        files |= {video_key(video_id, index, name): data for name, data in variants.items() if data is not None}
    return files


class ContentStore:
    """Files in `storage`, each recorded in `files` before its first byte is written and until it is deleted."""

    def __init__(self, files: FileRecords, images: ImageRecords, storage: Storage):
        self._files = files
        self._images = images
        self._storage = storage

    def sweep(self) -> None:
        """Delete what interrupted writes and deletes left behind, and record the sizes of files for which an older
        server did not. Call it only while nothing is being written."""
        self._files.forget(self._delete(self._files.unowned()))
        self._files.reserve({key: self._num_bytes(key) for key in self._files.unmeasured()})

    async def write(self, files: Mapping[str, bytes]) -> None:
        """Write all of the files, or none if that fails or is cancelled. No record owns them yet."""
        self._files.reserve({key: len(data) for key, data in files.items()})
        try:
            for key, data in files.items():
                await _finished(self._storage.put, key, data)
        except BaseException:
            with suppress(sqlite3.OperationalError):  # must not replace a cancellation; the next start sweeps the files
                await self.discard(files)
            raise

    async def discard(self, keys: Collection[str]) -> None:
        """Delete files that no record owns."""
        if keys:
            self._files.forget(await _finished(self._delete, keys))

    async def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        try:
            return await asyncio.to_thread(self._storage.read, key, offset, length)
        except FileNotFoundError:
            raise _gone() from None

    async def video(self, video_id: str, num_outputs: int, variant: Variant, index: int) -> Content:
        key = video_key(video_id, index, variant)
        if not self._files.owns(video_id, key):
            raise APIError(404, f"Video '{video_id}' has no {variant} {index}", code="content_not_found")
        extension, media_type = _VARIANTS[variant]
        name = video_id if num_outputs == 1 else f"{video_id}-{index}"
        return Content(key, await self._size(key), media_type, f"{name}.{extension}")

    async def image(self, image_id: str, index: int, tenant: str | None = None) -> Content:
        output_format = self._images.output_format(image_id, tenant)
        key = image_key(image_id, index, output_format)
        if not self._files.owns(image_id, key):
            raise APIError(404, f"Image '{image_id}' has no output {index}", code="content_not_found")
        return Content(key, await self._size(key), f"image/{output_format}", key.rpartition("/")[2])

    async def _size(self, key: str) -> int:
        try:
            return await asyncio.to_thread(self._storage.size, key)
        except FileNotFoundError:
            raise _gone() from None

    def _num_bytes(self, key: str) -> int:
        try:
            return self._storage.size(key)
        except FileNotFoundError:  # removed by hand
            return 0

    def _delete(self, keys: Collection[str]) -> list[str]:
        """Delete files, and return the keys of those that are gone; the others are retried at the next startup."""
        deleted = []
        for key in keys:
            try:
                self._storage.delete(key)
                deleted.append(key)
            except OSError:
                logger.warning("cannot delete %s", key, exc_info=True)
        return deleted


async def _finished(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a blocking function in a thread. Cancellation waits for it to return, because a thread cannot be stopped."""
    call = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        await asyncio.wait([call])
        raise


def _gone() -> APIError:
    return APIError(404, "This content is no longer stored", code="content_not_found")
