"""`JobStore`: which files belong to whom, and how long they are kept."""

from __future__ import annotations

import time

import pytest

from deployments.errors import APIError
from deployments.interfaces import VideoStatus
from deployments.jobs import IllegalTransition, JobStore
from tests.deployments.jobs.rows import COMPLETED, FAILED, IN_PROGRESS, a_job, a_video


class TestFiles:
    def test_belong_to_nobody_until_a_record_is_written(self, store: JobStore):
        store.reserve({"a": 1, "b": 2})
        assert sorted(store.unowned()) == ["a", "b"]
        store.create(a_job("video_1"), "wan", None, ["a"])
        assert store.unowned() == ["b"]
        assert store.owns("video_1", "a")
        assert not store.owns("video_1", "b")
        assert not store.owns("video_2", "a")

    def test_change_hands_with_the_status(self, store: JobStore):
        store.create(a_job("video_1"), "wan", None, ["input"])
        assert store.transition("video_1", IN_PROGRESS) == []
        assert store.owns("video_1", "input")
        store.reserve({"clip": 1})
        assert store.transition("video_1", COMPLETED, files=["clip"]) == ["input"]
        assert store.owns("video_1", "clip")
        assert store.unowned() == ["input"]

    def test_keep_their_owner_where_the_change_is_illegal(self, store: JobStore):
        store.create(a_job("video_1"), "wan", None, ["input"])
        with pytest.raises(IllegalTransition):
            store.transition("video_1", COMPLETED, files=[])
        assert store.owns("video_1", "input")

    def test_of_a_deleted_job_are_to_be_deleted_until_that_is_done(self, store: JobStore):
        store.create(a_job("video_1"), "wan", None, ["input"])
        assert store.delete("video_1") == ["input"]
        assert store.unowned() == ["input"]
        store.forget(["input"])
        assert store.unowned() == []

    def test_that_somebody_owns_are_not_forgotten(self, store: JobStore):
        store.add_image("image_1", "webp", ["picture"])
        store.forget(["picture"])
        assert store.owns("image_1", "picture")
        assert store.image_format("image_1") == "webp"
        with pytest.raises(APIError, match="No image with id 'image_2'"):
            store.image_format("image_2")


class TestRetention:
    @pytest.fixture
    def filled(self, store: JobStore) -> JobStore:
        """Finished in order: a failed video, one of 100 bytes, an image of 30, a video of 50. Two are unfinished."""
        a_video(store, FAILED, "video_failed")
        for video_id, size in [("video_100", 100), ("image_30", 30), ("video_50", 50)]:
            store.reserve({f"file_{video_id}": size})
            if video_id.startswith("image"):
                store.add_image(video_id, "png", [f"file_{video_id}"])
            else:
                a_video(store, IN_PROGRESS, video_id)
                store.transition(video_id, COMPLETED, files=[f"file_{video_id}"])
        store.reserve({"input": 1000})
        store.create(a_job("video_queued"), "wan", None, ["input"])
        a_video(store, IN_PROGRESS, "video_running")
        return store

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
    def test_by_bytes_takes_the_oldest_until_the_rest_has_room(self, filled: JobStore, budget: int, gone: list[str]):
        assert filled.remove_oldest_beyond(budget) == [f"file_{name}" for name in gone]
        assert set(filled.unowned()) == {f"file_{name}" for name in gone}
        left = {video.job.id for video in filled.page(None, 10, "asc").videos}
        assert left == {"video_failed", "video_queued", "video_running", "video_100", "video_50"} - set(gone)
        assert filled.owns("video_queued", "input")
        assert filled.remove_oldest_beyond(budget) == []

    def test_by_age_takes_what_was_finished_too_long_ago(self, filled: JobStore):
        assert filled.remove_older_than(60) == []
        assert sorted(filled.remove_older_than(0)) == ["file_image_30", "file_video_100", "file_video_50"]
        assert [video.job.id for video in filled.page(None, 10, "asc").videos] == ["video_queued", "video_running"]
        with pytest.raises(APIError, match="No image"):
            filled.image_format("image_30")

    def test_tells_when_a_finished_job_will_go(self, path: str):
        store = JobStore(path, ttl_s=3600)
        for status in VideoStatus:
            video = store.get(a_video(store, status, f"video_{status}"))
            expected = pytest.approx(time.time() + 3600, abs=5) if status in (COMPLETED, FAILED) else None
            assert video.expires_at == expected
        store.close()

    def test_counts_a_file_that_is_written_again_once(self, store: JobStore):
        a_video(store, IN_PROGRESS)
        for size in (70, 40):
            store.reserve({"clip": size})
        store.transition("video_1", COMPLETED, files=["clip"])
        assert store.remove_oldest_beyond(40) == []
        assert store.remove_oldest_beyond(39) == ["clip"]
