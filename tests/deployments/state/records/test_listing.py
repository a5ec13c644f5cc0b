"""`Records`: which jobs are found, in which order, and by whom."""

from __future__ import annotations

import pytest

from deployments.errors import APIError
from deployments.state.records import Records
from tests.deployments.state.records.rows import COMPLETED, FAILED, IN_PROGRESS, QUEUED, a_job, a_video


class TestListing:
    @pytest.fixture
    def ids(self, records: Records) -> list[str]:
        """Seven jobs, all created within the same second, in this order."""
        names = [f"video_{name}" for name in "gbfaced"]
        for name in names:
            records.videos.create(a_job(name), "wan", None, ())
        return names

    @pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
    @pytest.mark.parametrize("order", ["asc", "desc"])
    def test_by_pages_gives_every_job_once_in_order(self, records: Records, ids: list[str], order, limit: int):
        seen, after, has_more = [], None, True
        while has_more:
            page = records.videos.page(after, limit, order)
            assert 0 < len(page.videos) <= limit
            seen += [video.job.id for video in page.videos]
            after, has_more = seen[-1], page.has_more
        assert seen == (ids if order == "asc" else ids[::-1])

    def test_goes_on_rightly_while_jobs_come_and_go(self, records: Records, ids: list[str]):
        first = records.videos.page(None, 2, "desc").videos
        assert [video.job.id for video in first] == ids[:-3:-1]
        records.videos.create(a_job("video_new"), "wan", None, ())
        records.videos.delete(ids[-1])
        assert [video.job.id for video in records.videos.page(first[-1].job.id, 2, "desc").videos] == [ids[4], ids[3]]

    def test_puts_a_new_job_first_even_where_the_newest_was_deleted(self, records: Records, ids: list[str]):
        records.videos.delete(ids[-1])
        records.videos.create(a_job("video_new"), "wan", None, ())
        assert records.videos.page(None, 1, "desc").videos[0].job.id == "video_new"

    def test_after_the_last_job_is_an_empty_page(self, records: Records, ids: list[str]):
        page = records.videos.page(ids[0], 5, "desc")
        assert (page.videos, page.has_more) == ((), False)

    def test_with_limit_0_only_tells_whether_there_are_more(self, records: Records, ids: list[str]):
        page = records.videos.page(None, 0, "desc")
        assert (page.videos, page.has_more) == ((), True)

    def test_after_an_unknown_job_is_a_404_that_names_the_parameter(self, records: Records, ids: list[str]):
        with pytest.raises(APIError) as error:
            records.videos.page("video_unknown", 2, "desc")
        assert (error.value.status, error.value.param) == (404, "after")

    def test_of_the_unfinished_gives_them_oldest_first(self, records: Records):
        for index, status in enumerate([COMPLETED, IN_PROGRESS, FAILED, QUEUED, IN_PROGRESS]):
            a_video(records, status, f"video_{index}")
        assert [video.job.id for video in records.videos.unfinished()] == ["video_1", "video_3", "video_4"]


class TestIdempotency:
    def test_the_same_key_gives_the_same_job(self, records: Records):
        first = records.videos.create(a_job("video_1"), "wan", "key", ())
        assert records.videos.create(a_job("video_2"), "wan", "key", ()) == first
        assert records.videos.find("video_2", "key") == first
        assert len(records.videos.page(None, 10, "desc").videos) == 1

    def test_the_same_id_gives_the_same_job(self, records: Records):
        first = records.videos.create(a_job("video_1"), "wan", None, ())
        assert records.videos.create(a_job("video_1"), "other", "key", ()) == first

    def test_jobs_without_a_key_are_different(self, records: Records):
        records.videos.create(a_job("video_1"), "wan", None, ())
        assert records.videos.find("video_2", None) is None
        assert records.videos.create(a_job("video_2"), "wan", None, ()).job.id == "video_2"

    def test_a_key_is_free_again_after_its_job_was_deleted(self, records: Records):
        records.videos.create(a_job("video_1"), "wan", "key", ())
        records.videos.delete("video_1")
        assert records.videos.create(a_job("video_2"), "wan", "key", ()).job.id == "video_2"


ALICE, BOB = "digest of a key", "digest of another"


class TestTenants:
    @pytest.fixture
    def videos(self, records: Records) -> dict[str, str | None]:
        """Tenants by video: one of Alice's, one of Bob's, one of nobody's."""
        tenants = {"video_1": ALICE, "video_2": BOB, "video_3": None}
        for video_id, tenant in tenants.items():
            records.videos.create(a_job(video_id), "wan", None, (), tenant)
        return tenants

    @pytest.mark.parametrize("tenant", [ALICE, BOB])
    def test_see_their_own_jobs_and_no_others(self, records: Records, videos: dict[str, str | None], tenant: str):
        seen = [video.job.id for video in records.videos.page(None, 10, "asc", tenant).videos]
        assert seen == [video_id for video_id, its in videos.items() if its == tenant]
        for video_id in videos.keys() - seen:
            for call in (records.videos.get, lambda video_id, tenant: records.videos.page(video_id, 10, "asc", tenant)):
                with pytest.raises(APIError) as error:
                    call(video_id, tenant)
                assert (error.value.status, error.value.code) == (404, "video_not_found")

    def test_are_told_of_anothers_job_what_they_are_told_of_none(self, records: Records, videos):
        told = []
        for video_id in ("video_2", "video_9"):
            with pytest.raises(APIError) as error:
                records.videos.get(video_id, ALICE)
            told.append(str(error.value).replace(video_id, "ID"))
        assert told[0] == told[1]

    def test_none_sees_all(self, records: Records, videos: dict[str, str | None]):
        assert [video.job.id for video in records.videos.page(None, 10, "asc").videos] == list(videos)
        assert [records.videos.get(video_id).job.id for video_id in videos] == list(videos)

    def test_page_through_their_own_jobs_only(self, records: Records):
        for index in range(6):
            records.videos.create(a_job(f"video_{index}"), "wan", None, (), ALICE if index % 2 else BOB)
        first = records.videos.page(None, 2, "desc", ALICE)
        assert ([video.job.id for video in first.videos], first.has_more) == (["video_5", "video_3"], True)
        last = records.videos.page("video_3", 2, "desc", ALICE)
        assert ([video.job.id for video in last.videos], last.has_more) == (["video_1"], False)

    def test_have_idempotency_keys_of_their_own(self, records: Records):
        videos = {
            tenant: records.videos.create(a_job(f"video_{index}"), "wan", "key", (), tenant)
            for index, tenant in enumerate((ALICE, BOB, None))
        }
        assert len({video.job.id for video in videos.values()}) == 3
        for tenant, video in videos.items():
            assert records.videos.create(a_job("video_again"), "wan", "key", (), tenant) == video

    def test_have_pictures_of_their_own(self, records: Records):
        records.images.add("image_1", "png", (), ALICE)
        assert records.images.output_format("image_1", ALICE) == records.images.output_format("image_1") == "png"
        with pytest.raises(APIError, match="No image with id 'image_1'"):
            records.images.output_format("image_1", BOB)
