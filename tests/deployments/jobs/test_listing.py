"""`JobStore`: which jobs are found, in which order, and by whom."""

from __future__ import annotations

import pytest

from deployments.errors import APIError
from deployments.jobs import JobStore
from tests.deployments.jobs.rows import COMPLETED, FAILED, IN_PROGRESS, QUEUED, a_job, a_video


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
