"""Video jobs as a durable state machine over one SQLite file, and the record of every stored file.

Statuses change in `JobStore.transition` alone, along `TRANSITIONS`. Files and rows agree because every file that is
about to be written is recorded first, without an owner; the transaction that changes a row also hands it its files.
What has no owner when the server starts is the rest of an interrupted write or delete, and goes.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from deployments.errors import APIError, not_found
from deployments.interfaces import Video, VideoError, VideoPage, VideoStatus
from pipelines.job import Job

TRANSITIONS: Mapping[VideoStatus, frozenset[VideoStatus]] = {
    VideoStatus.QUEUED: frozenset({VideoStatus.IN_PROGRESS, VideoStatus.FAILED}),
    # To itself: a further attempt begins, after a crash. No way leads back to `queued`.
    VideoStatus.IN_PROGRESS: frozenset({VideoStatus.IN_PROGRESS, VideoStatus.COMPLETED, VideoStatus.FAILED}),
    VideoStatus.COMPLETED: frozenset(),
    VideoStatus.FAILED: frozenset(),
}

_MIGRATIONS = (
    """
    CREATE TABLE videos (
        position INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of arrival; never given twice, also after a delete
        id TEXT NOT NULL UNIQUE,
        idempotency_key TEXT UNIQUE,
        job TEXT NOT NULL,                           -- JSON
        model TEXT NOT NULL,
        status TEXT NOT NULL,
        progress INTEGER NOT NULL DEFAULT 0,
        attempts INTEGER NOT NULL DEFAULT 0,         -- times its computation began
        created_at REAL NOT NULL,                    -- Unix seconds, as is completed_at
        completed_at REAL,
        error_code TEXT,
        error_message TEXT,
        timings TEXT NOT NULL DEFAULT '{}'           -- JSON: seconds by stage
    );
    CREATE TABLE images (
        id TEXT PRIMARY KEY,
        output_format TEXT NOT NULL,
        created_at REAL NOT NULL
    );
    CREATE TABLE files (
        key TEXT PRIMARY KEY,
        owner TEXT                                   -- id of a video or an image; NULL: to be deleted
    );
    CREATE INDEX files_by_owner ON files (owner);
    """,
    """
    CREATE TABLE notes (
        name TEXT PRIMARY KEY,
        value TEXT NOT NULL                          -- JSON
    );
    """,
)
"""The script at index i brings a file from schema version i to i + 1 (SQLite's `user_version`)."""

_LOCK_TIMEOUT_S = 30.0
"""How long to wait for the lock of a predecessor that was killed but is not yet gone."""


class IllegalTransition(RuntimeError):
    """A bug in the caller: the table has no such way."""


class JobStore:
    """The records of one server. Not thread-safe, and alone: the file stays locked until `close` or the process ends.

    A status change is on the disk when the call returns. Progress is in the operating system's hands: it survives
    the death of the process, not that of the machine.
    """

    def __init__(self, path: str):
        """Open or make the file, and bring it to the newest schema.

        Raises:
            sqlite3.OperationalError: another process has the file open.
            RuntimeError: a newer version of the server wrote it.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, timeout=_LOCK_TIMEOUT_S, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        # Set before WAL, an exclusive lock also spares the shared memory file, which network filesystems lack.
        self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._migrate(path)

    def close(self) -> None:
        self._connection.close()

    def create(self, job: Job, model: str, idempotency_key: str | None, files: Collection[str]) -> Video:
        """A queued job that owns `files`; or the one that already has its id or its idempotency key."""
        with self._transaction():
            created = self._connection.execute(
                "INSERT INTO videos (id, idempotency_key, job, model, status, created_at) VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT DO NOTHING",
                (job.id, idempotency_key, job.model_dump_json(), model, VideoStatus.QUEUED, time.time()),
            )
            if created.rowcount:
                self._claim(job.id, files)
        video = self.find(job.id, idempotency_key)
        assert video is not None
        return video

    def find(self, video_id: str, idempotency_key: str | None) -> Video | None:
        """The job with this id or this idempotency key."""
        row = self._connection.execute(
            "SELECT * FROM videos WHERE id = ? OR idempotency_key = ?", (video_id, idempotency_key)
        ).fetchone()
        return row and _video(row)

    def get(self, video_id: str) -> Video:
        return _video(self._row(video_id))

    def attempts(self, video_id: str) -> int:
        """How many times the computation of the job began."""
        return self._row(video_id)["attempts"]

    def page(self, after: str | None, limit: int, order: Literal["asc", "desc"]) -> VideoPage:
        """At most `limit` jobs in order of arrival (`desc`: the newest first), those that follow `after`."""
        beyond, direction = ("<", "DESC") if order == "desc" else (">", "ASC")
        where, position = "", []
        if after is not None:
            start = self._connection.execute("SELECT position FROM videos WHERE id = ?", (after,)).fetchone()
            if start is None:
                raise APIError(404, f"No video with id '{after}'", param="after", code="video_not_found")
            where, position = f"WHERE position {beyond} ?", [start["position"]]
        rows = self._connection.execute(
            f"SELECT * FROM videos {where} ORDER BY position {direction} LIMIT ?", (*position, limit + 1)
        ).fetchall()
        return VideoPage(videos=tuple(_video(row) for row in rows[:limit]), has_more=len(rows) > limit)

    def unfinished(self) -> list[Video]:
        """The queued and the running jobs, the oldest first."""
        rows = self._connection.execute(
            "SELECT * FROM videos WHERE status IN (?, ?) ORDER BY position",
            (VideoStatus.QUEUED, VideoStatus.IN_PROGRESS),
        )
        return [_video(row) for row in rows]

    def count_unfinished(self) -> int:
        return self._connection.execute(
            "SELECT count(*) FROM videos WHERE status IN (?, ?)", (VideoStatus.QUEUED, VideoStatus.IN_PROGRESS)
        ).fetchone()[0]

    def transition(
        self,
        video_id: str,
        to: VideoStatus,
        *,
        files: Collection[str] | None = None,
        timings: Mapping[str, float] | None = None,
        error: VideoError | None = None,
    ) -> list[str]:
        """Change a job's status; into `in_progress` counts one attempt.

        With `files`, the job owns these from now on and no others. Returns the keys it owned no more: to be deleted.
        Raises `IllegalTransition`, and `APIError` 404 for an unknown id.
        """
        with self._transaction():
            status = VideoStatus(self._row(video_id)["status"])
            if to not in TRANSITIONS[status]:
                raise IllegalTransition(f"video {video_id}: {status} -> {to}")
            completed = to is VideoStatus.COMPLETED
            self._connection.execute(
                "UPDATE videos SET status = ?, attempts = attempts + ?, progress = max(progress, ?), completed_at = ?,"
                " error_code = ?, error_message = ?, timings = ? WHERE id = ?",
                (
                    to,
                    to is VideoStatus.IN_PROGRESS,
                    100 if completed else 0,
                    time.time() if completed else None,
                    error and error.code,
                    error and error.message,
                    json.dumps(dict(timings or {})),
                    video_id,
                ),
            )
            return [] if files is None else self._claim(video_id, files)

    def advance(self, video_id: str, percent: int) -> None:
        """Record the progress of a running job. It never falls, and stays below 100 until the job is completed."""
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute(
            "UPDATE videos SET progress = ?1 WHERE id = ?2 AND status = ?3 AND progress < ?1",
            (min(percent, 99), video_id, VideoStatus.IN_PROGRESS),
        )
        self._connection.execute("PRAGMA synchronous = FULL")

    def delete(self, video_id: str) -> list[str]:
        """Forget a job. Returns the keys of its files: to be deleted."""
        with self._transaction():
            self._row(video_id)
            self._connection.execute("DELETE FROM videos WHERE id = ?", (video_id,))
            return self._claim(video_id, ())

    def add_image(self, image_id: str, output_format: str, files: Collection[str]) -> None:
        """Record a stored picture (or several of one job) that owns `files`."""
        with self._transaction():
            self._connection.execute(
                "INSERT INTO images VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (image_id, output_format, time.time())
            )
            self._claim(image_id, files)

    def image_format(self, image_id: str) -> str:
        """png, webp or jpeg. Raises `APIError` 404."""
        row = self._connection.execute("SELECT output_format FROM images WHERE id = ?", (image_id,)).fetchone()
        if row is None:
            raise not_found("image", image_id)
        return row["output_format"]

    def note(self, name: str, value: Any) -> None:
        """Keep a JSON value under a name."""
        self._connection.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, json.dumps(value)))

    def noted(self, name: str) -> Any:
        """The value kept last under this name, or None."""
        row = self._connection.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return row and json.loads(row["value"])

    def reserve(self, keys: Iterable[str]) -> None:
        """Record files that are about to be written: should the process die now, they are deleted at the next start."""
        with self._transaction():
            self._connection.executemany(
                "INSERT INTO files VALUES (?, NULL) ON CONFLICT DO NOTHING", [(key,) for key in keys]
            )

    def owns(self, owner: str, key: str) -> bool:
        found = self._connection.execute("SELECT 1 FROM files WHERE key = ? AND owner = ?", (key, owner))
        return found.fetchone() is not None

    def unowned(self) -> list[str]:
        """Keys of files that belong to no record."""
        return [row["key"] for row in self._connection.execute("SELECT key FROM files WHERE owner IS NULL")]

    def forget(self, keys: Iterable[str]) -> None:
        """The files are deleted."""
        with self._transaction():
            self._connection.executemany("DELETE FROM files WHERE key = ? AND owner IS NULL", [(key,) for key in keys])

    def _claim(self, owner: str, keys: Collection[str]) -> list[str]:
        """Make `keys` all that `owner` owns, within the caller's transaction. Returns what it owned before."""
        before = [row["key"] for row in self._connection.execute("SELECT key FROM files WHERE owner = ?", (owner,))]
        self._connection.execute("UPDATE files SET owner = NULL WHERE owner = ?", (owner,))
        self._connection.executemany(
            "INSERT INTO files VALUES (?1, ?2) ON CONFLICT DO UPDATE SET owner = ?2", [(key, owner) for key in keys]
        )
        return [key for key in before if key not in keys]

    def _row(self, video_id: str) -> sqlite3.Row:
        row = self._connection.execute("SELECT * FROM videos WHERE id = ?", (video_id,)).fetchone()
        if row is None:
            raise not_found("video", video_id)
        return row

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        with self._connection:  # commits, or rolls back
            yield

    def _migrate(self, path: str) -> None:
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(_MIGRATIONS):
            raise RuntimeError(f"{path} has schema version {version}; this server knows {len(_MIGRATIONS)}")
        for target, script in enumerate(_MIGRATIONS[version:], start=version + 1):
            self._connection.executescript(f"BEGIN; {script} PRAGMA user_version = {target}; COMMIT;")


def _video(row: sqlite3.Row) -> Video:
    return Video(
        job=Job.model_validate_json(row["job"]),
        model=row["model"],
        status=VideoStatus(row["status"]),
        progress=row["progress"],
        created_at=int(row["created_at"]),
        completed_at=None if row["completed_at"] is None else int(row["completed_at"]),
        error=None if row["error_code"] is None else VideoError(row["error_code"], row["error_message"]),
        timings=json.loads(row["timings"]),
    )
