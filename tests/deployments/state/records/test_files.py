"""`FileRecords` and `FinishedRecords`: which files belong to whom, and how long they are kept."""

from __future__ import annotations

import time

import pytest

from deployments.errors import APIError
from deployments.interfaces import VideoStatus
from deployments.state.records import Records
from deployments.state.videos import IllegalTransition
from tests.deployments.state.records.rows import COMPLETED, FAILED, IN_PROGRESS, a_job, a_video


class TestFiles:
    def test_belong_to_nobody_until_a_record_is_written(self, records: Records):
        records.files.reserve({"a": 1, "b": 2})
        assert sorted(records.files.unowned()) == ["a", "b"]
        records.videos.create(a_job("video_1"), "wan", None, ["a"])
        assert records.files.unowned() == ["b"]
        assert records.files.owns("video_1", "a")
        assert not records.files.owns("video_1", "b")
        assert not records.files.owns("video_2", "a")

    def test_change_hands_with_the_status(self, records: Records):
        records.videos.create(a_job("video_1"), "wan", None, ["input"])
        assert records.videos.transition("video_1", IN_PROGRESS) == []
        assert records.files.owns("video_1", "input")
        records.files.reserve({"clip": 1})
        assert records.videos.transition("video_1", COMPLETED, files=["clip"]) == ["input"]
        assert records.files.owns("video_1", "clip")
        assert records.files.unowned() == ["input"]

    def test_keep_their_owner_where_the_change_is_illegal(self, records: Records):
        records.videos.create(a_job("video_1"), "wan", None, ["input"])
        with pytest.raises(IllegalTransition):
            records.videos.transition("video_1", COMPLETED, files=[])
        assert records.files.owns("video_1", "input")

    def test_of_a_deleted_job_are_to_be_deleted_until_that_is_done(self, records: Records):
        records.videos.create(a_job("video_1"), "wan", None, ["input"])
        assert records.videos.delete("video_1") == ["input"]
        assert records.files.unowned() == ["input"]
        records.files.forget(["input"])
        assert records.files.unowned() == []

    def test_that_somebody_owns_are_not_forgotten(self, records: Records):
        records.images.add("image_1", "webp", ["picture"])
        records.files.forget(["picture"])
        assert records.files.owns("image_1", "picture")
        assert records.images.output_format("image_1") == "webp"
        with pytest.raises(APIError, match="No image with id 'image_2'"):
            records.images.output_format("image_2")


class TestRetention:
    @pytest.fixture
    def filled(self, records: Records) -> Records:
        """Finished in order: a failed video, one of 100 bytes, an image of 30, a video of 50. Two are unfinished."""
        a_video(records, FAILED, "video_failed")
        for video_id, size in [("video_100", 100), ("image_30", 30), ("video_50", 50)]:
            records.files.reserve({f"file_{video_id}": size})
            if video_id.startswith("image"):
                records.images.add(video_id, "png", [f"file_{video_id}"])
            else:
                a_video(records, IN_PROGRESS, video_id)
                records.videos.transition(video_id, COMPLETED, files=[f"file_{video_id}"])
        records.files.reserve({"input": 1000})
        records.videos.create(a_job("video_queued"), "wan", None, ["input"])
        a_video(records, IN_PROGRESS, "video_running")
        return records

    @pytest.mark.parametrize(
        ("budget", "gone"),
        [
            (180, []),
            (179, ["video_100"]),
            (80, ["video_100"]),
            (79, ["video_100", "image_30"]),
            (0, ["video_100", "image_30", "video_50"]),
        ],
    )
    def test_by_bytes_takes_the_oldest_until_the_rest_has_room(self, filled: Records, budget: int, gone: list[str]):
        assert filled.finished.remove_oldest_beyond(budget) == [f"file_{name}" for name in gone]
        assert set(filled.files.unowned()) == {f"file_{name}" for name in gone}
        left = {video.job.id for video in filled.videos.page(None, 10, "asc").videos}
        assert left == {"video_failed", "video_queued", "video_running", "video_100", "video_50"} - set(gone)
        assert filled.files.owns("video_queued", "input")
        assert filled.finished.remove_oldest_beyond(budget) == []

    def test_by_age_takes_what_was_finished_too_long_ago(self, filled: Records):
        assert filled.finished.remove_older_than(60) == []
        assert sorted(filled.finished.remove_older_than(0)) == ["file_image_30", "file_video_100", "file_video_50"]
        left = filled.videos.page(None, 10, "asc").videos
        assert [video.job.id for video in left] == ["video_queued", "video_running"]
        with pytest.raises(APIError, match="No image"):
            filled.images.output_format("image_30")

    def test_tells_when_a_finished_job_will_go(self, path: str):
        records = Records(path, ttl_s=3600)
        for status in VideoStatus:
            video = records.videos.get(a_video(records, status, f"video_{status}"))
            expected = pytest.approx(time.time() + 3600, abs=5) if status in (COMPLETED, FAILED) else None
            assert video.expires_at == expected
        records.close()

    def test_counts_a_file_that_is_written_again_once(self, records: Records):
        a_video(records, IN_PROGRESS)
        for size in (70, 40):
            records.files.reserve({"clip": size})
        records.videos.transition("video_1", COMPLETED, files=["clip"])
        assert records.finished.remove_oldest_beyond(40) == []
        assert records.finished.remove_oldest_beyond(39) == ["clip"]
