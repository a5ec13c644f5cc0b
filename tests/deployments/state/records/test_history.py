"""`VideoRecords`: arbitrary histories of jobs, against a model in memory."""

from __future__ import annotations

from tempfile import TemporaryDirectory

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from deployments.errors import APIError
from deployments.interfaces import VideoStatus
from deployments.state.records import Records
from deployments.state.videos import TRANSITIONS, IllegalTransition
from tests.deployments.state.records.rows import COMPLETED, IN_PROGRESS, QUEUED, a_job


class JobHistory(RuleBasedStateMachine):
    """Jobs are created, changed and deleted, and the file is reopened, at any moment."""

    ids = Bundle("ids")

    def __init__(self):
        super().__init__()
        self.folder = TemporaryDirectory()
        self.path = f"{self.folder.name}/jobs.sqlite3"
        self.records = Records(self.path)
        self.expected: dict[str, tuple[VideoStatus, int, int]] = {}
        """Status, progress and attempts by id, in order of arrival."""
        self.count = 0

    @rule(target=ids)
    def create(self):
        self.count += 1
        video_id = f"video_{self.count}"
        self.records.videos.create(a_job(video_id), "wan", None, ())
        self.expected[video_id] = (QUEUED, 0, 0)
        return video_id

    @rule(video_id=ids, to=st.sampled_from(VideoStatus))
    def change_status(self, video_id: str, to: VideoStatus):
        status, progress, attempts = self.expected.get(video_id, (None, 0, 0))
        try:
            self.records.videos.transition(video_id, to)
        except APIError:
            assert status is None
        except IllegalTransition:
            assert to not in TRANSITIONS[status]
        else:
            progress = 100 if to is COMPLETED else progress
            self.expected[video_id] = (to, progress, attempts + (to is IN_PROGRESS))

    @rule(video_id=ids, percent=st.integers(0, 100))
    def advance(self, video_id: str, percent: int):
        self.records.videos.advance(video_id, percent)
        status, progress, attempts = self.expected.get(video_id, (None, 0, 0))
        if status is IN_PROGRESS:
            self.expected[video_id] = (status, max(progress, min(percent, 99)), attempts)

    @rule(video_id=ids)
    def delete(self, video_id: str):
        if video_id in self.expected:
            self.records.videos.delete(video_id)
            del self.expected[video_id]

    @rule()
    def reopen(self):
        self.records.close()
        self.records = Records(self.path)

    @invariant()
    def everything_is_as_expected(self):
        videos = self.records.videos.page(None, 1000, "asc").videos
        found = {v.job.id: (v.status, v.progress, self.records.videos.attempts(v.job.id)) for v in videos}
        assert list(found.items()) == list(self.expected.items())
        unfinished = [video_id for video_id, (status, *_) in self.expected.items() if TRANSITIONS[status]]
        assert [video.job.id for video in self.records.videos.unfinished()] == unfinished

    def teardown(self):
        self.records.close()
        self.folder.cleanup()


TestJobHistory = JobHistory.TestCase
TestJobHistory.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
