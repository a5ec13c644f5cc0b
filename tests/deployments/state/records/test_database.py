"""`Database`: its file outlives processes and versions."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from deployments.interfaces import VideoStatus
from deployments.state import database, schema
from deployments.state.records import Records
from tests.deployments.state.records.rows import COMPLETED, FAILED, IN_PROGRESS, a_job, a_video

FIRST_MIGRATIONS = schema.MIGRATIONS[:2]
"""Those of the server before it had tenants and retention."""

AN_OLD_FILE = """
    INSERT INTO videos (id, idempotency_key, job, model, status, created_at, completed_at, error_code, error_message)
    VALUES ('video_1', NULL, 'JOB', 'wan', 'failed', 10, NULL, 'server_error', 'No'),
           ('video_2', 'key', 'JOB', 'wan', 'completed', 20, 30, NULL, NULL),
           ('video_3', NULL, 'JOB', 'wan', 'in_progress', 20, NULL, NULL, NULL);
    INSERT INTO images VALUES ('image_1', 'webp', 20);
    INSERT INTO files VALUES ('clip', 'video_2');
"""


class TestTheFile:
    def test_keeps_everything_over_a_reopening(self, path: str):
        records = Records(path)
        for status in VideoStatus:
            a_video(records, status, f"video_{status}")
        records.videos.advance("video_in_progress", 40)
        records.files.reserve({"half": 1})
        before = records.videos.page(None, 10, "desc")
        records.close()

        records = Records(path)
        assert records.videos.page(None, 10, "desc") == before
        assert before.videos[0].job == a_job("video_failed")
        assert records.videos.get("video_in_progress").progress == 40
        assert records.videos.attempts("video_in_progress") == 1
        assert records.files.unowned() == ["half"]
        records.close()

    def test_is_of_one_process_alone(self, records: Records, path: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(database, "_LOCK_TIMEOUT_S", 0.1)
        with pytest.raises(RuntimeError, match="in use by another server"):
            Records(path)
        records.videos.create(a_job("video_1"), "wan", None, ())

    def test_of_a_newer_server_is_refused_unharmed(self, path: str):
        Records(path).close()
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA user_version = 1000")
        before = Path(path).read_bytes()
        with pytest.raises(RuntimeError, match="schema version 1000"):
            Records(path)
        assert Path(path).read_bytes() == before

    def test_of_an_older_server_is_brought_up_to_date(self, path: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(schema, "MIGRATIONS", FIRST_MIGRATIONS)
        Path(path).parent.mkdir()
        with closing(sqlite3.connect(path)) as connection:
            schema.migrate(connection)
            connection.executescript(AN_OLD_FILE.replace("JOB", a_job("video_1").model_dump_json()))
        monkeypatch.undo()

        records = Records(path, ttl_s=60)
        failed, completed, running = records.videos.page(None, 10, "asc").videos
        assert [video.status for video in (failed, completed, running)] == [FAILED, COMPLETED, IN_PROGRESS]
        assert (failed.completed_at, completed.completed_at, running.completed_at) == (None, 30, None)
        assert (failed.expires_at, completed.expires_at, running.expires_at) == (70, 90, None)
        assert records.videos.find("video_new", "key") == completed
        assert records.images.output_format("image_1") == "webp"
        assert records.files.unmeasured() == ["clip"]
        assert records.files.owns("video_2", "clip")
        records.videos.create(a_job("video_4"), "wan", None, ())
        assert records.videos.page(None, 1, "desc").videos[0].job.id == "video_4"
        records.close()
        Records(path).close()  # the second time, there is nothing to do
