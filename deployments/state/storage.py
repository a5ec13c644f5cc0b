"""Where files are stored: a local folder, or any fsspec URL (`s3://bucket/prefix`, `gs://…`, `memory://…`)."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

_KEY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)
"""No segment starts with a dot, so a key names neither a parent folder nor a file that is still being written."""


class Storage:
    """Files by key. A file is complete or absent, whenever the process or the machine stops.

    For this, a local file is written aside, synced and renamed. Elsewhere it relies on the filesystem: object stores
    show an object only once it is complete. All methods block; they may be called from any thread.
    """

    def __init__(self, url: str):
        self._filesystem, self._root = fsspec.core.url_to_fs(url)
        self._is_local = isinstance(self._filesystem, LocalFileSystem)

    def put(self, key: str, data: bytes) -> None:
        """Write a file, replacing any with the same key. It is on the disk when this returns."""
        if self._is_local:
            _replace(Path(self._path(key)), data)
        else:
            self._filesystem.pipe_file(self._path(key), data)

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `offset`, fewer where the file ends. Raises `FileNotFoundError`."""
        end = None if length is None else offset + length
        return self._filesystem.cat_file(self._path(key), start=offset, end=end)

    def size(self, key: str) -> int:
        """Bytes in the file. Raises `FileNotFoundError`."""
        return self._filesystem.size(self._path(key))

    def delete(self, key: str) -> None:
        """Remove the file and what an interrupted `put` left of it. A missing file is no error."""
        path = self._path(key)
        with suppress(FileNotFoundError):
            self._filesystem.rm_file(path)
        if self._is_local:
            _aside(Path(path)).unlink(missing_ok=True)

    def _path(self, key: str) -> str:
        if not _KEY.fullmatch(key):
            raise ValueError(f"not a storage key: {key!r}")
        return f"{self._root.rstrip('/')}/{key}"


def _replace(path: Path, data: bytes) -> None:
    _make_folder(path.parent)
    aside = _aside(path)
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    _sync_folder(path.parent)


def _aside(path: Path) -> Path:
    """The name depends on the key alone, so whoever knows the key can also remove what a crash left."""
    return path.with_name(f".{path.name}.partial")


def _make_folder(path: Path) -> None:
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """A new name is on the disk only once its folder is synced too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
