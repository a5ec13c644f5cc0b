"""Video jobs as a durable state machine over one SQLite file, and the record of every stored file.

Only `JobStore.transition` changes a status, along `TRANSITIONS`. Files and rows agree because every file is recorded,
without an owner, before it is written; the transaction that changes a row also gives it its files. A file without an
owner at startup is left over from an interrupted write or delete, and is deleted.
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
from deployments.schema import migrate
from pipelines.job import Job

TRANSITIONS: Mapping[VideoStatus, frozenset[VideoStatus]] = {
    VideoStatus.QUEUED: frozenset({VideoStatus.IN_PROGRESS, VideoStatus.FAILED}),
    # To itself: another attempt begins after a crash. Nothing leads back to `queued`.
    VideoStatus.IN_PROGRESS: frozenset({VideoStatus.IN_PROGRESS, VideoStatus.COMPLETED, VideoStatus.FAILED}),
    VideoStatus.COMPLETED: frozenset(),
    VideoStatus.FAILED: frozenset(),
}

_LOCK_TIMEOUT_S = 30.0
"""How long to wait for the lock of a predecessor that was killed but is not yet gone."""


class IllegalTransition(RuntimeError):
    """A bug in the caller: `TRANSITIONS` does not allow this change."""


class StateInUse(RuntimeError):
    """Another process has the file open."""


class JobStore:
    """The records of one server. Not thread-safe. The file stays locked until `close` or the end of the process.

    A status change is on the disk when the call returns. Progress is left to the operating system to write: it survives
    the death of the process, not that of the machine.
    """

    def __init__(self, path: str, *, ttl_s: float | None = None, patience_s: float | None = None):
        """Open or create the file, and migrate it to the newest schema.

        Args:
            ttl_s: how long finished videos are kept, reported to clients.
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
        self._ttl_s = ttl_s
        self.num_finished = 0
        """Videos and images finished since the file was opened."""

    def close(self) -> None:
        self._connection.close()

    def create(
        self,
        job: Job,
        model: str,
        idempotency_key: str | None,
        files: Collection[str],
        tenant: str | None = None,
    ) -> Video:
        """Add a queued job that owns `files`, or return the one that has its id or the tenant's idempotency key."""
        with self._transaction():
            created = self._connection.execute(
                "INSERT INTO videos (id, tenant, idempotency_key, job, model, status, created_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (job.id, tenant, idempotency_key, job.model_dump_json(), model, VideoStatus.QUEUED, time.time()),
            )
            if created.rowcount:
                self._claim(job.id, files)
        video = self.find(job.id, idempotency_key, tenant)
        assert video is not None
        return video

    def find(self, video_id: str, idempotency_key: str | None, tenant: str | None = None) -> Video | None:
        """The job with this id, or with this idempotency key of the tenant."""
        row = self._connection.execute(
            "SELECT * FROM videos WHERE id = ?1 OR (idempotency_key = ?2 AND ifnull(tenant, '') = ifnull(?3, ''))",
            (video_id, idempotency_key, tenant),
        ).fetchone()
        return row and self._video(row)

    def get(self, video_id: str, tenant: str | None = None) -> Video:
        """Raises `APIError` 404 for one that is unknown, or another tenant's."""
        return self._video(self._row(video_id, tenant))

    def accepted_at(self, video_id: str) -> float:
        """Unix seconds."""
        return self._row(video_id)["created_at"]

    def attempts(self, video_id: str) -> int:
        """How many times the computation of the job began."""
        return self._row(video_id)["attempts"]

    def page(
        self, after: str | None, limit: int, order: Literal["asc", "desc"], tenant: str | None = None
    ) -> VideoPage:
        """At most `limit` jobs that follow `after`, in order of arrival (`desc`: newest first)."""
        beyond, direction = ("<", "DESC") if order == "desc" else (">", "ASC")
        conditions: dict[str, Any] = {} if tenant is None else {"tenant = ?": tenant}
        if after is not None:
            try:
                conditions[f"position {beyond} ?"] = self._row(after, tenant)["position"]
            except APIError as error:
                error.param = "after"
                raise
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        rows = self._connection.execute(
            f"SELECT * FROM videos {where} ORDER BY position {direction} LIMIT ?", (*conditions.values(), limit + 1)
        ).fetchall()
        return VideoPage(videos=tuple(self._video(row) for row in rows[:limit]), has_more=len(rows) > limit)

    def unfinished(self) -> list[Video]:
        """The queued and running jobs, oldest first."""
        rows = self._connection.execute(
            "SELECT * FROM videos WHERE status IN (?, ?) ORDER BY position",
            (VideoStatus.QUEUED, VideoStatus.IN_PROGRESS),
        )
        return [self._video(row) for row in rows]

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
        """Change a job's status; a change to `in_progress` counts one attempt.

        With `files`, the job owns exactly these from now on. Returns the keys that it no longer owns, to be deleted.
        Raises `IllegalTransition`, and `APIError` 404 for an unknown id.
        """
        with self._transaction():
            status = VideoStatus(self._row(video_id)["status"])
            if to not in TRANSITIONS[status]:
                raise IllegalTransition(f"video {video_id}: {status} -> {to}")
            finished = not TRANSITIONS[to]
            self.num_finished += finished
            self._connection.execute(
                "UPDATE videos SET status = ?, attempts = attempts + ?, progress = max(progress, ?), finished_at = ?,"
                " error_code = ?, error_message = ?, timings = ? WHERE id = ?",
                (
                    to,
                    to is VideoStatus.IN_PROGRESS,
                    100 if to is VideoStatus.COMPLETED else 0,
                    time.time() if finished else None,
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
        try:
            self._connection.execute(
                "UPDATE videos SET progress = ?1 WHERE id = ?2 AND status = ?3 AND progress < ?1",
                (min(percent, 99), video_id, VideoStatus.IN_PROGRESS),
            )
        finally:
            self._connection.execute("PRAGMA synchronous = FULL")

    def delete(self, video_id: str) -> list[str]:
        """Forget a job. Returns the keys of its files, to be deleted."""
        with self._transaction():
            self._row(video_id)
            self._connection.execute("DELETE FROM videos WHERE id = ?", (video_id,))
            return self._claim(video_id, ())

    def remove_older_than(self, seconds: float) -> list[str]:
        """Forget jobs and images that finished at least `seconds` ago. Returns the keys of their files."""
        due = self._connection.execute("SELECT id FROM finished WHERE finished_at <= ?", (time.time() - seconds,))
        return self._remove([row["id"] for row in due])

    def remove_oldest_beyond(self, num_bytes: int) -> list[str]:
        """Forget finished jobs and images, oldest first, until the files of the remaining ones take at most
        `num_bytes`. Returns the keys of the forgotten files."""
        # All files minus those of the few unfinished jobs: looking up those of the many finished ones takes ten times
        # as long (1.2 s instead of 0.1 s for 100,000).
        stored, unfinished = self._connection.execute(
            "SELECT (SELECT sum(num_bytes) FROM files WHERE owner IS NOT NULL), (SELECT sum(num_bytes) FROM files"
            " WHERE owner IN (SELECT id FROM videos WHERE finished_at IS NULL))"
        ).fetchone()
        surplus = (stored or 0) - (unfinished or 0) - num_bytes
        due = []
        for row in self._connection.execute("SELECT id FROM finished ORDER BY finished_at"):
            if surplus <= 0:
                break
            size = self._connection.execute("SELECT sum(num_bytes) FROM files WHERE owner = ?", (row["id"],))
            if freed := size.fetchone()[0]:  # forgetting a failed job would free no room
                due.append(row["id"])
                surplus -= freed
        return self._remove(due)

    def _remove(self, ids: Collection[str]) -> list[str]:
        if not ids:
            return []
        with self._transaction():
            for table in ("videos", "images"):
                self._connection.executemany(f"DELETE FROM {table} WHERE id = ?", [(name,) for name in ids])
            return [key for name in ids for key in self._claim(name, ())]

    def add_image(self, image_id: str, output_format: str, files: Collection[str], tenant: str | None = None) -> None:
        """Record a stored image (or several of one job) that owns `files`."""
        with self._transaction():
            self._connection.execute(
                "INSERT INTO images (id, tenant, output_format, created_at) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (image_id, tenant, output_format, time.time()),
            )
            self._claim(image_id, files)
            self.num_finished += 1

    def image_format(self, image_id: str, tenant: str | None = None) -> str:
        """png, webp or jpeg. Raises `APIError` 404 for one that is unknown, or another tenant's."""
        row = self._connection.execute(
            "SELECT output_format FROM images WHERE id = ?1 AND tenant IS ifnull(?2, tenant)", (image_id, tenant)
        ).fetchone()
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

    def reserve(self, sizes: Mapping[str, int]) -> None:
        """Record files that are about to be written, with their sizes: if the process dies now, the next startup
        deletes them."""
        with self._transaction():
            self._connection.executemany(
                "INSERT INTO files (key, num_bytes) VALUES (?1, ?2) ON CONFLICT DO UPDATE SET num_bytes = ?2",
                sizes.items(),
            )

    def stored_bytes(self) -> int:
        """Total size of all recorded files."""
        return self._connection.execute("SELECT ifnull(sum(num_bytes), 0) FROM files").fetchone()[0]

    def unmeasured(self) -> list[str]:
        """Keys of files whose size was not recorded."""
        return [row["key"] for row in self._connection.execute("SELECT key FROM files WHERE num_bytes IS NULL")]

    def owns(self, owner: str, key: str) -> bool:
        found = self._connection.execute("SELECT 1 FROM files WHERE key = ? AND owner = ?", (key, owner))
        return found.fetchone() is not None

    def unowned(self) -> list[str]:
        """Keys of files that belong to no record."""
        return [row["key"] for row in self._connection.execute("SELECT key FROM files WHERE owner IS NULL")]

    def forget(self, keys: Iterable[str]) -> None:
        """Forget files that have been deleted."""
        with self._transaction():
            self._connection.executemany("DELETE FROM files WHERE key = ? AND owner IS NULL", [(key,) for key in keys])

    def _claim(self, owner: str, keys: Collection[str]) -> list[str]:
        """Make `keys` all that `owner` owns, within the caller's transaction. Returns what it no longer owns."""
        before = [row["key"] for row in self._connection.execute("SELECT key FROM files WHERE owner = ?", (owner,))]
        self._connection.execute("UPDATE files SET owner = NULL WHERE owner = ?", (owner,))
        self._connection.executemany(
            "INSERT INTO files (key, owner) VALUES (?1, ?2) ON CONFLICT DO UPDATE SET owner = ?2",
            [(key, owner) for key in keys],
        )
        return [key for key in before if key not in keys]

    def _row(self, video_id: str, tenant: str | None = None) -> sqlite3.Row:
        row = self._connection.execute(
            "SELECT * FROM videos WHERE id = ?1 AND tenant IS ifnull(?2, tenant)", (video_id, tenant)
        ).fetchone()
        if row is None:
            raise not_found("video", video_id)
        return row

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        with self._connection:  # commits, or rolls back
            yield

    def _video(self, row: sqlite3.Row) -> Video:
        status = VideoStatus(row["status"])
        finished_at = row["finished_at"]
        return Video(
            job=Job.model_validate_json(row["job"]),
            model=row["model"],
            status=status,
            progress=row["progress"],
            created_at=int(row["created_at"]),
            completed_at=int(finished_at) if status is VideoStatus.COMPLETED else None,
            expires_at=None if finished_at is None or self._ttl_s is None else int(finished_at + self._ttl_s),
            error=None if row["error_code"] is None else VideoError(row["error_code"], row["error_message"]),
            timings=json.loads(row["timings"]),
        )
