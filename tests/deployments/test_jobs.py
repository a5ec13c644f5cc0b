"""`JobStore`: what is recorded, in which order, and which status may follow which."""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from deployments import jobs, schema
from deployments.errors import APIError
from deployments.interfaces import VideoError, VideoStatus
from deployments.jobs import TRANSITIONS, IllegalTransition, JobStore
from pipelines.job import Job, LoRASpec, Task

QUEUED, IN_PROGRESS, COMPLETED, FAILED = VideoStatus
OUT_OF_MEMORY = VideoError("server_error", "The GPUs are out of memory")


def a_job(video_id: str) -> Job:
    return Job(
        id=video_id,
        task=Task.IMAGE_TO_VIDEO,
        prompt="a lighthouse — 灯台",
        width=832,
        height=480,
        num_frames=81,
        fps=16,
        num_inference_steps=50,
        seeds=(7, 8),
        images=("0" * 64,),
        lora=(LoRASpec(nickname="ink", identity="ink@1", strength=0.5),),
        output_format="mp4",
    )


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "state" / "jobs.sqlite3")


@pytest.fixture
def store(path: str) -> Iterator[JobStore]:
    store = JobStore(path)
    yield store
    store.close()


def a_video(store: JobStore, status: VideoStatus, video_id: str = "video_1") -> str:
    """Bring a new job to `status` by the shortest legal way."""
    store.create(a_job(video_id), "wan", None, ())
    way = {QUEUED: (), IN_PROGRESS: (IN_PROGRESS,), COMPLETED: (IN_PROGRESS, COMPLETED), FAILED: (FAILED,)}
    for step in way[status]:
        store.transition(video_id, step, error=OUT_OF_MEMORY if step is FAILED else None)
    return video_id


class TestStatus:
    @pytest.mark.parametrize(("status", "to"), list(itertools.product(VideoStatus, VideoStatus)))
    def test_changes_along_the_table_and_no_other_way(self, store: JobStore, status: VideoStatus, to: VideoStatus):
        video_id = a_video(store, status)
        legal = (status, to) in {
            (QUEUED, IN_PROGRESS),
            (QUEUED, FAILED),
            (IN_PROGRESS, IN_PROGRESS),
            (IN_PROGRESS, COMPLETED),
            (IN_PROGRESS, FAILED),
        }
        assert legal == (to in TRANSITIONS[status])
        before = store.get(video_id)
        if legal:
            store.transition(video_id, to)
            assert store.get(video_id).status is to
        else:
            with pytest.raises(IllegalTransition, match=f"{status} -> {to}"):
                store.transition(video_id, to)
            assert store.get(video_id) == before

    def test_of_a_completed_job_has_time_and_timings(self, store: JobStore):
        video_id = a_video(store, IN_PROGRESS)
        store.transition(video_id, COMPLETED, timings={"denoise": 1.5})
        video = store.get(video_id)
        assert video.progress == 100
        assert video.completed_at is not None
        assert video.completed_at >= video.created_at
        assert video.timings == {"denoise": 1.5}

    def test_of_a_failed_job_has_the_reason_and_no_completion(self, store: JobStore):
        video = store.get(a_video(store, FAILED))
        assert (video.error, video.completed_at, video.progress) == (OUT_OF_MEMORY, None, 0)

    def test_counts_an_attempt_each_time_the_computation_begins(self, store: JobStore):
        video_id = a_video(store, QUEUED)
        assert store.attempts(video_id) == 0
        for attempt in (1, 2, 3):
            store.transition(video_id, IN_PROGRESS)
            assert store.attempts(video_id) == attempt
        store.transition(video_id, COMPLETED)
        assert store.attempts(video_id) == 3

    def test_of_an_unknown_job_is_a_404(self, store: JobStore):
        for call in (store.get, store.delete, lambda video_id: store.transition(video_id, FAILED)):
            with pytest.raises(APIError) as error:
                call("video_unknown")
            assert (error.value.status, error.value.code) == (404, "video_not_found")


class TestProgress:
    def test_never_falls_and_stays_below_100(self, store: JobStore):
        video_id = a_video(store, IN_PROGRESS)
        seen = []
        for percent in (0, 40, 20, 99, 100, 3):
            store.advance(video_id, percent)
            seen.append(store.get(video_id).progress)
        assert seen == [0, 40, 40, 99, 99, 99]

    def test_is_kept_by_a_further_attempt_and_by_failure(self, store: JobStore):
        video_id = a_video(store, IN_PROGRESS)
        store.advance(video_id, 40)
        store.transition(video_id, IN_PROGRESS)
        assert store.get(video_id).progress == 40
        store.transition(video_id, FAILED, error=OUT_OF_MEMORY)
        assert store.get(video_id).progress == 40

    @pytest.mark.parametrize("status", [QUEUED, FAILED, COMPLETED])
    def test_of_a_job_that_does_not_run_cannot_move(self, store: JobStore, status: VideoStatus):
        video_id = a_video(store, status)
        before = store.get(video_id)
        store.advance(video_id, 50)
        assert store.get(video_id) == before


class TestListing:
    @pytest.fixture
    def ids(self, store: JobStore) -> list[str]:
        """Seven jobs, all created within the same second, in this order."""
        names = [f"video_{name}" for name in "gbfaced"]
        for name in names:
            store.create(a_job(name), "wan", None, ())
        return names

    @pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
    @pytest.mark.parametrize("order", ["asc", "desc"])
    def test_by_pages_gives_every_job_once_in_order(self, store: JobStore, ids: list[str], order, limit: int):
        seen, after, has_more = [], None, True
        while has_more:
            page = store.page(after, limit, order)
            assert 0 < len(page.videos) <= limit
            seen += [video.job.id for video in page.videos]
            after, has_more = seen[-1], page.has_more
        assert seen == (ids if order == "asc" else ids[::-1])

    def test_goes_on_rightly_while_jobs_come_and_go(self, store: JobStore, ids: list[str]):
        first = store.page(None, 2, "desc").videos
        assert [video.job.id for video in first] == ids[:-3:-1]
        store.create(a_job("video_new"), "wan", None, ())
        store.delete(ids[-1])
        assert [video.job.id for video in store.page(first[-1].job.id, 2, "desc").videos] == [ids[4], ids[3]]

    def test_puts_a_new_job_first_even_where_the_newest_was_deleted(self, store: JobStore, ids: list[str]):
        store.delete(ids[-1])
        store.create(a_job("video_new"), "wan", None, ())
        assert store.page(None, 1, "desc").videos[0].job.id == "video_new"

    def test_after_the_last_job_is_an_empty_page(self, store: JobStore, ids: list[str]):
        page = store.page(ids[0], 5, "desc")
        assert (page.videos, page.has_more) == ((), False)

    def test_with_limit_0_only_tells_whether_there_are_more(self, store: JobStore, ids: list[str]):
        page = store.page(None, 0, "desc")
        assert (page.videos, page.has_more) == ((), True)

    def test_after_an_unknown_job_is_a_404_that_names_the_parameter(self, store: JobStore, ids: list[str]):
        with pytest.raises(APIError) as error:
            store.page("video_unknown", 2, "desc")
        assert (error.value.status, error.value.param) == (404, "after")

    def test_of_the_unfinished_gives_them_oldest_first(self, store: JobStore):
        for index, status in enumerate([COMPLETED, IN_PROGRESS, FAILED, QUEUED, IN_PROGRESS]):
            a_video(store, status, f"video_{index}")
        assert [video.job.id for video in store.unfinished()] == ["video_1", "video_3", "video_4"]


class TestIdempotency:
    def test_the_same_key_gives_the_same_job(self, store: JobStore):
        first = store.create(a_job("video_1"), "wan", "key", ())
        assert store.create(a_job("video_2"), "wan", "key", ()) == first
        assert store.find("video_2", "key") == first
        assert len(store.page(None, 10, "desc").videos) == 1

    def test_the_same_id_gives_the_same_job(self, store: JobStore):
        first = store.create(a_job("video_1"), "wan", None, ())
        assert store.create(a_job("video_1"), "other", "key", ()) == first

    def test_jobs_without_a_key_are_different(self, store: JobStore):
        store.create(a_job("video_1"), "wan", None, ())
        assert store.find("video_2", None) is None
        assert store.create(a_job("video_2"), "wan", None, ()).job.id == "video_2"

    def test_a_key_is_free_again_after_its_job_was_deleted(self, store: JobStore):
        store.create(a_job("video_1"), "wan", "key", ())
        store.delete("video_1")
        assert store.create(a_job("video_2"), "wan", "key", ()).job.id == "video_2"


ALICE, BOB = "digest of a key", "digest of another"


class TestTenants:
    @pytest.fixture
    def videos(self, store: JobStore) -> dict[str, str | None]:
        """Tenants by video: one of Alice's, one of Bob's, one of nobody's."""
        tenants = {"video_1": ALICE, "video_2": BOB, "video_3": None}
        for video_id, tenant in tenants.items():
            store.create(a_job(video_id), "wan", None, (), tenant)
        return tenants

    @pytest.mark.parametrize("tenant", [ALICE, BOB])
    def test_see_their_own_jobs_and_no_others(self, store: JobStore, videos: dict[str, str | None], tenant: str):
        seen = [video.job.id for video in store.page(None, 10, "asc", tenant).videos]
        assert seen == [video_id for video_id, its in videos.items() if its == tenant]
        for video_id in videos.keys() - seen:
            for call in (store.get, lambda video_id, tenant: store.page(video_id, 10, "asc", tenant)):
                with pytest.raises(APIError) as error:
                    call(video_id, tenant)
                assert (error.value.status, error.value.code) == (404, "video_not_found")

    def test_are_told_of_anothers_job_what_they_are_told_of_none(self, store: JobStore, videos):
        told = []
        for video_id in ("video_2", "video_9"):
            with pytest.raises(APIError) as error:
                store.get(video_id, ALICE)
            told.append(str(error.value).replace(video_id, "ID"))
        assert told[0] == told[1]

    def test_none_sees_all(self, store: JobStore, videos: dict[str, str | None]):
        assert [video.job.id for video in store.page(None, 10, "asc").videos] == list(videos)
        assert [store.get(video_id).job.id for video_id in videos] == list(videos)

    def test_page_through_their_own_jobs_only(self, store: JobStore):
        for index in range(6):
            store.create(a_job(f"video_{index}"), "wan", None, (), ALICE if index % 2 else BOB)
        first = store.page(None, 2, "desc", ALICE)
        assert ([video.job.id for video in first.videos], first.has_more) == (["video_5", "video_3"], True)
        last = store.page("video_3", 2, "desc", ALICE)
        assert ([video.job.id for video in last.videos], last.has_more) == (["video_1"], False)

    def test_have_idempotency_keys_of_their_own(self, store: JobStore):
        videos = {
            tenant: store.create(a_job(f"video_{index}"), "wan", "key", (), tenant)
            for index, tenant in enumerate((ALICE, BOB, None))
        }
        assert len({video.job.id for video in videos.values()}) == 3
        for tenant, video in videos.items():
            assert store.create(a_job("video_again"), "wan", "key", (), tenant) == video

    def test_have_pictures_of_their_own(self, store: JobStore):
        store.add_image("image_1", "png", (), ALICE)
        assert store.image_format("image_1", ALICE) == store.image_format("image_1") == "png"
        with pytest.raises(APIError, match="No image with id 'image_1'"):
            store.image_format("image_1", BOB)


class TestRetention:
    @pytest.fixture
    def filled(self, store: JobStore) -> JobStore:
        """Finished in this order: a failed video, one of 100 bytes, a picture of 30, a video of 50. Two go on."""
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


class TestTheFile:
    def test_keeps_everything_over_a_reopening(self, path: str):
        store = JobStore(path)
        for status in VideoStatus:
            a_video(store, status, f"video_{status}")
        store.advance("video_in_progress", 40)
        store.reserve({"half": 1})
        before = store.page(None, 10, "desc")
        store.close()

        store = JobStore(path)
        assert store.page(None, 10, "desc") == before
        assert before.videos[0].job == a_job("video_failed")
        assert store.get("video_in_progress").progress == 40
        assert store.attempts("video_in_progress") == 1
        assert store.unowned() == ["half"]
        store.close()

    def test_is_of_one_process_alone(self, store: JobStore, path: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(jobs, "_LOCK_TIMEOUT_S", 0.1)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            JobStore(path)
        store.create(a_job("video_1"), "wan", None, ())

    def test_of_a_newer_server_is_refused_unharmed(self, path: str):
        JobStore(path).close()
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA user_version = 1000")
        before = Path(path).read_bytes()
        with pytest.raises(RuntimeError, match="schema version 1000"):
            JobStore(path)
        assert Path(path).read_bytes() == before

    def test_of_an_older_server_is_brought_up_to_date(self, path: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(schema, "MIGRATIONS", FIRST_MIGRATIONS)
        Path(path).parent.mkdir()
        with closing(sqlite3.connect(path)) as connection:
            schema.migrate(connection)
            connection.executescript(AN_OLD_FILE.replace("JOB", a_job("video_1").model_dump_json()))
        monkeypatch.undo()

        store = JobStore(path, ttl_s=60)
        failed, completed, running = store.page(None, 10, "asc").videos
        assert [video.status for video in (failed, completed, running)] == [FAILED, COMPLETED, IN_PROGRESS]
        assert (failed.completed_at, completed.completed_at, running.completed_at) == (None, 30, None)
        assert (failed.expires_at, completed.expires_at, running.expires_at) == (70, 90, None)
        assert store.find("video_new", "key") == completed
        assert store.image_format("image_1") == "webp"
        assert store.unmeasured() == ["clip"]
        assert store.owns("video_2", "clip")
        store.create(a_job("video_4"), "wan", None, ())
        assert store.page(None, 1, "desc").videos[0].job.id == "video_4"
        store.close()
        JobStore(path).close()  # the second time there is nothing to do


FIRST_MIGRATIONS = schema.MIGRATIONS[:2]
"""Those of the server that knew neither tenants nor retention."""

AN_OLD_FILE = """
    INSERT INTO videos (id, idempotency_key, job, model, status, created_at, completed_at, error_code, error_message)
    VALUES ('video_1', NULL, 'JOB', 'wan', 'failed', 10, NULL, 'server_error', 'No'),
           ('video_2', 'key', 'JOB', 'wan', 'completed', 20, 30, NULL, NULL),
           ('video_3', NULL, 'JOB', 'wan', 'in_progress', 20, NULL, NULL, NULL);
    INSERT INTO images VALUES ('image_1', 'webp', 20);
    INSERT INTO files VALUES ('clip', 'video_2');
"""


class JobHistory(RuleBasedStateMachine):
    """Any history of jobs, with reopenings at any moment, against a model in memory."""

    ids = Bundle("ids")

    def __init__(self):
        super().__init__()
        self.folder = TemporaryDirectory()
        self.path = f"{self.folder.name}/jobs.sqlite3"
        self.store = JobStore(self.path)
        self.expected: dict[str, tuple[VideoStatus, int, int]] = {}
        """Status, progress and attempts by id, in order of arrival."""
        self.count = 0

    @rule(target=ids)
    def create(self):
        self.count += 1
        video_id = f"video_{self.count}"
        self.store.create(a_job(video_id), "wan", None, ())
        self.expected[video_id] = (QUEUED, 0, 0)
        return video_id

    @rule(video_id=ids, to=st.sampled_from(VideoStatus))
    def change_status(self, video_id: str, to: VideoStatus):
        status, progress, attempts = self.expected.get(video_id, (None, 0, 0))
        try:
            self.store.transition(video_id, to)
        except APIError:
            assert status is None
        except IllegalTransition:
            assert to not in TRANSITIONS[status]
        else:
            progress = 100 if to is COMPLETED else progress
            self.expected[video_id] = (to, progress, attempts + (to is IN_PROGRESS))

    @rule(video_id=ids, percent=st.integers(0, 100))
    def advance(self, video_id: str, percent: int):
        self.store.advance(video_id, percent)
        status, progress, attempts = self.expected.get(video_id, (None, 0, 0))
        if status is IN_PROGRESS:
            self.expected[video_id] = (status, max(progress, min(percent, 99)), attempts)

    @rule(video_id=ids)
    def delete(self, video_id: str):
        if video_id in self.expected:
            self.store.delete(video_id)
            del self.expected[video_id]

    @rule()
    def reopen(self):
        self.store.close()
        self.store = JobStore(self.path)

    @invariant()
    def everything_is_as_expected(self):
        videos = self.store.page(None, 1000, "asc").videos
        found = {v.job.id: (v.status, v.progress, self.store.attempts(v.job.id)) for v in videos}
        assert list(found.items()) == list(self.expected.items())
        unfinished = [video_id for video_id, (status, *_) in self.expected.items() if TRANSITIONS[status]]
        assert [video.job.id for video in self.store.unfinished()] == unfinished

    def teardown(self):
        self.store.close()
        self.folder.cleanup()


TestJobHistory = JobHistory.TestCase
TestJobHistory.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
