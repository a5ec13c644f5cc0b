"""`VideoRecords`: which status may follow which, and what is recorded with it."""

from __future__ import annotations

import itertools

import pytest

from deployments.errors import APIError
from deployments.interfaces import VideoStatus
from deployments.state.records import Records
from deployments.state.videos import TRANSITIONS, IllegalTransition
from tests.deployments.state.records.rows import COMPLETED, FAILED, IN_PROGRESS, OUT_OF_MEMORY, QUEUED, a_video


class TestStatus:
    @pytest.mark.parametrize(("status", "to"), list(itertools.product(VideoStatus, VideoStatus)))
    def test_changes_along_the_table_and_no_other_way(self, records: Records, status: VideoStatus, to: VideoStatus):
        video_id = a_video(records, status)
        legal = (status, to) in {
            (QUEUED, IN_PROGRESS),
            (QUEUED, FAILED),
            (IN_PROGRESS, IN_PROGRESS),
            (IN_PROGRESS, COMPLETED),
            (IN_PROGRESS, FAILED),
        }
        assert legal == (to in TRANSITIONS[status])
        before = records.videos.get(video_id)
        if legal:
            records.videos.transition(video_id, to)
            assert records.videos.get(video_id).status is to
        else:
            with pytest.raises(IllegalTransition, match=f"{status} -> {to}"):
                records.videos.transition(video_id, to)
            assert records.videos.get(video_id) == before

    def test_of_a_completed_job_has_time_and_timings(self, records: Records):
        video_id = a_video(records, IN_PROGRESS)
        records.videos.transition(video_id, COMPLETED, timings={"denoise": 1.5})
        video = records.videos.get(video_id)
        assert video.progress == 100
        assert video.completed_at is not None
        assert video.completed_at >= video.created_at
        assert video.timings == {"denoise": 1.5}

    def test_of_a_failed_job_has_the_reason_and_no_completion(self, records: Records):
        video = records.videos.get(a_video(records, FAILED))
        assert (video.error, video.completed_at, video.progress) == (OUT_OF_MEMORY, None, 0)

    def test_counts_an_attempt_each_time_the_computation_begins(self, records: Records):
        video_id = a_video(records, QUEUED)
        assert records.videos.attempts(video_id) == 0
        for attempt in (1, 2, 3):
            records.videos.transition(video_id, IN_PROGRESS)
            assert records.videos.attempts(video_id) == attempt
        records.videos.transition(video_id, COMPLETED)
        assert records.videos.attempts(video_id) == 3

    def test_of_an_unknown_job_is_a_404(self, records: Records):
        videos = records.videos
        for call in (videos.get, videos.delete, lambda video_id: videos.transition(video_id, FAILED)):
            with pytest.raises(APIError) as error:
                call("video_unknown")
            assert (error.value.status, error.value.code) == (404, "video_not_found")


class TestProgress:
    def test_never_falls_and_stays_below_100(self, records: Records):
        video_id = a_video(records, IN_PROGRESS)
        seen = []
        for percent in (0, 40, 20, 99, 100, 3):
            records.videos.advance(video_id, percent)
            seen.append(records.videos.get(video_id).progress)
        assert seen == [0, 40, 40, 99, 99, 99]

    def test_is_kept_by_a_further_attempt_and_by_failure(self, records: Records):
        video_id = a_video(records, IN_PROGRESS)
        records.videos.advance(video_id, 40)
        records.videos.transition(video_id, IN_PROGRESS)
        assert records.videos.get(video_id).progress == 40
        records.videos.transition(video_id, FAILED, error=OUT_OF_MEMORY)
        assert records.videos.get(video_id).progress == 40

    @pytest.mark.parametrize("status", [QUEUED, FAILED, COMPLETED])
    def test_of_a_job_that_does_not_run_cannot_move(self, records: Records, status: VideoStatus):
        video_id = a_video(records, status)
        before = records.videos.get(video_id)
        records.videos.advance(video_id, 50)
        assert records.videos.get(video_id) == before
