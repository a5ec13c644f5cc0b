"""The record of every stored file: its size, and the video or image that owns it.

Files and records agree because every file is recorded, without an owner, before it is written; the transaction that
changes its owner's row also gives it its files. A file without an owner at startup is left over from an interrupted
write or delete, and is deleted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from deployments.state.database import Database


class FileRecords:
    """Which files there are, by key."""

    def __init__(self, database: Database):
        self._database = database

    def reserve(self, sizes: Mapping[str, int]) -> None:
        """Record files that are about to be written, with their sizes: if the process dies now, the next startup
        deletes them."""
        with self._database.transaction():
            self._database.executemany(
                "INSERT INTO files (key, num_bytes) VALUES (?1, ?2) ON CONFLICT DO UPDATE SET num_bytes = ?2",
                sizes.items(),
            )

    def claim(self, owner: str, keys: Collection[str]) -> list[str]:
        """Make `keys` all that `owner` owns, within the caller's transaction. Returns what it no longer owns."""
        before = [row["key"] for row in self._database.execute("SELECT key FROM files WHERE owner = ?", (owner,))]
        self._database.execute("UPDATE files SET owner = NULL WHERE owner = ?", (owner,))
        self._database.executemany(
            "INSERT INTO files (key, owner) VALUES (?1, ?2) ON CONFLICT DO UPDATE SET owner = ?2",
            [(key, owner) for key in keys],
        )
        return [key for key in before if key not in keys]

    def forget(self, keys: Iterable[str]) -> None:
        """Forget files that have been deleted."""
        with self._database.transaction():
            self._database.executemany("DELETE FROM files WHERE key = ? AND owner IS NULL", [(key,) for key in keys])

    def owns(self, owner: str, key: str) -> bool:
        found = self._database.execute("SELECT 1 FROM files WHERE key = ? AND owner = ?", (key, owner))
        return found.fetchone() is not None

    def unowned(self) -> list[str]:
        """Keys of files that belong to no record."""
        return [row["key"] for row in self._database.execute("SELECT key FROM files WHERE owner IS NULL")]

    def unmeasured(self) -> list[str]:
        """Keys of files whose size was not recorded."""
        return [row["key"] for row in self._database.execute("SELECT key FROM files WHERE num_bytes IS NULL")]

    def num_bytes(self) -> int:
        """Total size of all recorded files."""
        return self._database.execute("SELECT ifnull(sum(num_bytes), 0) FROM files").fetchone()[0]
