"""Video jobs as a durable state machine: only `VideoRecords.transition` changes a status, along `TRANSITIONS`."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection, Mapping
from typing import Any, Literal

from deployments.errors import APIError, not_found
from deployments.interfaces import Video, VideoError, VideoPage, VideoStatus
from deployments.state.database import Database
from deployments.state.files import FileRecords
from pipelines.job import Job

TRANSITIONS: Mapping[VideoStatus, frozenset[VideoStatus]] = {
    VideoStatus.QUEUED: frozenset({VideoStatus.IN_PROGRESS, VideoStatus.FAILED}),
    # To itself: another attempt begins after a crash. Nothing leads back to `queued`.
    VideoStatus.IN_PROGRESS: frozenset({VideoStatus.IN_PROGRESS, VideoStatus.COMPLETED, VideoStatus.FAILED}),
    VideoStatus.COMPLETED: frozenset(),
    VideoStatus.FAILED: frozenset(),
}


class IllegalTransition(RuntimeError):
    """A bug in the caller: `TRANSITIONS` does not allow this change."""


class VideoRecords:
    """The jobs, in order of arrival. A status change is on the disk when the call returns."""

    def __init__(self, database: Database, files: FileRecords, *, ttl_s: float | None = None):
        """`ttl_s`: how long finished videos are kept, reported to clients."""
        self._database = database
        self._files = files
        self._ttl_s = ttl_s
        self.num_finished = 0
        """Since the database was opened."""

    def create(
        self,
        job: Job,
        model: str,
        idempotency_key: str | None,
        files: Collection[str],
        tenant: str | None = None,
    ) -> Video:
        """Add a queued job that owns `files`, or return the one that has its id or the tenant's idempotency key."""
        with self._database.transaction():
            created = self._database.execute(
                "INSERT INTO videos (id, tenant, idempotency_key, job, model, status, created_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (job.id, tenant, idempotency_key, job.model_dump_json(), model, VideoStatus.QUEUED, time.time()),
            )
            if created.rowcount:
                self._files.claim(job.id, files)
        video = self.find(job.id, idempotency_key, tenant)
        assert video is not None
        return video

    def find(self, video_id: str, idempotency_key: str | None, tenant: str | None = None) -> Video | None:
        """The job with this id, or with this idempotency key of the tenant."""
        row = self._database.execute(
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
        rows = self._database.execute(
            f"SELECT * FROM videos {where} ORDER BY position {direction} LIMIT ?", (*conditions.values(), limit + 1)
        ).fetchall()
        return VideoPage(videos=tuple(self._video(row) for row in rows[:limit]), has_more=len(rows) > limit)

    def unfinished(self) -> list[Video]:
        """The queued and running jobs, oldest first."""
        rows = self._database.execute(
            "SELECT * FROM videos WHERE status IN (?, ?) ORDER BY position",
            (VideoStatus.QUEUED, VideoStatus.IN_PROGRESS),
        )
        return [self._video(row) for row in rows]

    def count_unfinished(self) -> int:
        return self._database.execute(
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
        with self._database.transaction():
            status = VideoStatus(self._row(video_id)["status"])
            if to not in TRANSITIONS[status]:
                raise IllegalTransition(f"video {video_id}: {status} -> {to}")
            finished = not TRANSITIONS[to]
            self.num_finished += finished
            self._database.execute(
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
            return [] if files is None else self._files.claim(video_id, files)

    def advance(self, video_id: str, percent: int) -> None:
        """Record the progress of a running job. It never falls, and stays below 100 until the job is completed."""
        with self._database.lazily():
            self._database.execute(
                "UPDATE videos SET progress = ?1 WHERE id = ?2 AND status = ?3 AND progress < ?1",
                (min(percent, 99), video_id, VideoStatus.IN_PROGRESS),
            )

    def delete(self, video_id: str) -> list[str]:
        """Forget a job. Returns the keys of its files, to be deleted."""
        with self._database.transaction():
            self._row(video_id)
            self._database.execute("DELETE FROM videos WHERE id = ?", (video_id,))
            return self._files.claim(video_id, ())

    def _row(self, video_id: str, tenant: str | None = None) -> sqlite3.Row:
        row = self._database.execute(
            "SELECT * FROM videos WHERE id = ?1 AND tenant IS ifnull(?2, tenant)", (video_id, tenant)
        ).fetchone()
        if row is None:
            raise not_found("video", video_id)
        return row

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
