"""The state's SQLite file: opened by one process alone, migrated, and changed in transactions."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deployments.state.schema import migrate

_LOCK_TIMEOUT_S = 30.0
"""How long to wait for the lock of a predecessor that was killed but is not yet gone."""


class StateInUse(RuntimeError):
    """Another process has the file open."""


class Database:
    """One connection. Not thread-safe. The file stays locked until `close` or the end of the process.

    What was executed is on the disk when the call returns, or when its transaction ends.
    """

    def __init__(self, path: str, *, patience_s: float | None = None):
        """Open or create the file, and migrate it to the newest schema.

        Args:
            patience_s: how long to wait while another process has the file open.

        Raises:
            StateInUse: another process still has the file open.
            RuntimeError: a newer version of the server wrote it.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        timeout = _LOCK_TIMEOUT_S if patience_s is None else patience_s
        self._connection = sqlite3.connect(path, timeout=timeout, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        # An exclusive lock set before WAL also avoids the shared memory file, which network filesystems lack.
        self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            raise StateInUse(
                f"'{path}' is in use by another server: each needs a --state-path and an --output-path of its own"
            ) from None
        self._connection.execute("PRAGMA synchronous = FULL")
        migrate(self._connection)

    def close(self) -> None:
        self._connection.close()

    def execute(self, statement: str, values: Iterable[Any] = ()) -> sqlite3.Cursor:
        return self._connection.execute(statement, tuple(values))

    def executemany(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        self._connection.executemany(statement, rows)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that the body executes, or nothing of it."""
        self._connection.execute("BEGIN IMMEDIATE")
        with self._connection:  # commits, or rolls back
            yield

    @contextmanager
    def lazily(self) -> Iterator[None]:
        """What the body executes is left to the operating system to write: it survives the death of the process, not
        that of the machine."""
        self._connection.execute("PRAGMA synchronous = NORMAL")
        try:
            yield
        finally:
            self._connection.execute("PRAGMA synchronous = FULL")
