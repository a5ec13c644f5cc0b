"""`/v1/videos`, as clients use it."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import pytest

from tests.e2e.pictures import decoded_frames, opened, picture
from tests.e2e.server import SHORT, Server

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

FORM = {name: str(value) for name, value in SHORT.items()}


@pytest.fixture(scope="module")
def clip(server: Server) -> str:
    """The id of a finished job of two videos."""
    return server.wait_for_video(server.create_video(n=2, seed=1)["id"])["id"]


def test_a_prompt_alone_gives_the_models_default_clip(server: Server) -> None:
    video = server.http.post("/v1/videos", json={"prompt": "p"}).json()
    frames = decoded_frames(server.http.get(f"/v1/videos/{server.wait_for_video(video['id'])['id']}/content").content)
    assert len(frames) == video["num_frames"]
    assert f"{frames[0].width}x{frames[0].height}" == video["size"]


def test_the_object_has_every_key_and_null_where_there_is_nothing(server: Server) -> None:
    video = server.create_video()
    for key in ("completed_at", "expires_at", "remixed_from_video_id", "error"):
        assert video[key] is None
    assert video["object"] == "video"
    assert video["prompt"] == SHORT["prompt"]
    assert video["status"] == "queued"
    assert video["progress"] == 0


@pytest.mark.parametrize("seconds", [2, "2", 2.0])
def test_seconds_may_be_a_number_or_a_text_and_are_told_as_a_text(server: Server, seconds: Any) -> None:
    video = server.create_video(num_frames=None, seconds=seconds, fps=3)
    assert (video["seconds"], video["num_frames"], video["fps"]) == ("2", 6, 3)


def test_num_frames_overrides_seconds(server: Server) -> None:
    assert server.create_video(seconds=4, num_frames=5)["num_frames"] == 5


@pytest.mark.parametrize("encoding", ["json", "multipart", "urlencoded"])
def test_every_encoding_means_the_same(server: Server, encoding: str) -> None:
    fields = {
        "prompt": "a cat & a dög",
        "seconds": "1",
        "fps": "4",
        "seed": "7",
        "size": "32x32",
        "num_inference_steps": "1",
        "guidance_scale": "2",
    }
    match encoding:
        case "json":
            answer = server.http.post("/v1/videos", json=fields)
        case "multipart":
            answer = server.http.post("/v1/videos", files={name: (None, value) for name, value in fields.items()})
        case _:
            answer = server.http.post("/v1/videos", data=fields)
    video = answer.json()
    assert (video["prompt"], video["num_frames"], video["seeds"], video["size"]) == ("a cat & a dög", 4, [7], "32x32")


def test_extra_body_reaches_the_job_through_openais_multipart(server: Server, adapters: tuple[str, str]) -> None:
    client = server.openai(strict=False)
    extra = {**SHORT, "seed": [3, 4], "negative_prompt": "", "fps": 5, "lora": [{"path": path} for path in adapters]}
    video = client.videos.create(prompt="p", extra_body=extra)
    assert video.model_extra["seeds"] == [3, 4]
    assert video.model_extra["fps"] == 5
    assert video.model_extra["n"] == 2


def test_a_structure_may_be_json_text_in_a_form(server: Server, adapters: tuple[str, str]) -> None:
    loras = json.dumps([{"nickname": "first", "path": adapters[0], "strength": 0.5}, {"path": adapters[1]}])
    body = urlencode({**SHORT, "lora": loras})
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert server.http.post("/v1/videos", content=body, headers=headers).status_code == 200


def test_an_adapter_of_the_requests_own_changes_the_clip(server: Server, adapters: tuple[str, str]) -> None:
    assert server.clip(seed=1, lora=[]) != server.clip(seed=1, lora={"path": adapters[0]})


def test_input_reference_starts_a_clip(server: Server) -> None:
    client = server.openai(strict=False)
    video = client.videos.create(prompt="p", input_reference=picture(), extra_body=SHORT)
    assert server.wait_for_video(video.id)["status"] == "completed"
    url = "data:image/png;base64," + b64encode(picture()).decode()
    for reference in (url, {"image_url": url}):
        server.create_video(input_reference=reference)
    nested = {**FORM, "input_reference[image_url]": url}
    assert server.http.post("/v1/videos", data=nested).status_code == 200


def test_a_clip_depends_on_the_picture_it_starts_from(server: Server) -> None:
    url = "data:image/png;base64," + b64encode(picture()).decode()
    assert server.clip(seed=1) != server.clip(seed=1, input_reference=url)


def test_an_unfinished_video_tells_when_to_ask_again_and_has_no_content(server: Server) -> None:
    video = server.create_video(num_inference_steps=1000, n=10)
    answer = server.http.get(f"/v1/videos/{video['id']}")
    assert int(answer.headers["openai-poll-after-ms"]) > 0
    assert answer.json()["progress"] < 100
    assert server.http.get(f"/v1/videos/{video['id']}/content").status_code == 404
    assert server.http.delete(f"/v1/videos/{video['id']}").json() == {
        "id": video["id"],
        "object": "video.deleted",
        "deleted": True,
    }


def test_deleting_a_running_video_frees_the_engine(server: Server) -> None:
    long = server.create_video(size="256x256", num_inference_steps=1000, n=10)
    server.wait_for_video(long["id"], until=lambda video: video["status"] == "in_progress")
    started = time.monotonic()
    server.http.delete(f"/v1/videos/{long['id']}")
    server.wait_for_video(server.create_video()["id"])
    assert time.monotonic() - started < 20  # 10,000 steps take minutes


def test_progress_is_whole_and_never_falls(server: Server) -> None:
    video = server.create_video(num_inference_steps=30)
    seen = [video["progress"]]
    while video["status"] not in ("completed", "failed"):
        video = server.video(video["id"])
        seen.append(video["progress"])
    assert seen[-1] == 100
    assert seen == sorted(seen)
    assert len(set(seen)) > 2
    assert all(type(progress) is int for progress in seen)


def test_a_list_is_walked_page_by_page_in_either_order(server: Server) -> None:
    made = [server.create_video()["id"] for _ in range(3)]
    client = server.openai(strict=False)
    newest = [video.id for video in client.videos.list(limit=2)]
    assert newest[:3] == made[::-1]
    assert [video.id for video in client.videos.list(limit=2, order="asc")] == newest[::-1]
    page = server.http.get("/v1/videos", params={"limit": 2}).json()
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (made[2], made[1])
    assert server.http.get("/v1/videos", params={"after": newest[-1]}).json()["data"] == []


def test_the_same_idempotency_key_gives_the_same_video(server: Server) -> None:
    one, other = uuid4().hex, uuid4().hex
    ids = [
        server.http.post("/v1/videos", json=SHORT, headers={"Idempotency-Key": key}).json()["id"]
        for key in (one, one, other)
    ]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("variant", "media_type"), [("video", "video/mp4"), ("thumbnail", "image/webp"), ("spritesheet", "image/jpeg")]
)
def test_each_variant_is_a_file_of_its_own_type(server: Server, clip: str, variant: str, media_type: str) -> None:
    answer = server.http.get(f"/v1/videos/{clip}/content", params={"variant": variant})
    assert answer.headers["content-type"] == media_type
    assert decoded_frames(answer.content) if variant == "video" else opened(answer.content)


def test_further_clips_are_variants_by_number(server: Server, clip: str) -> None:
    files = [server.http.get(f"/v1/videos/{clip}/content", params={"variant": i}).content for i in (0, 1)]
    assert files[0] != files[1]
    assert files[1] == server.http.get(f"/v1/videos/{clip}/content", params={"variant": "video", "index": 1}).content
    assert server.http.get(f"/v1/videos/{clip}/content", params={"variant": 2}).status_code == 404


def test_a_download_offers_a_name_and_no_path(server: Server, clip: str) -> None:
    answer = server.http.get(f"/v1/videos/{clip}/content")
    assert answer.headers["content-disposition"] == f'attachment; filename="{clip}-0.mp4"'
    assert "/" not in answer.headers["etag"]


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("bytes=0-9", slice(0, 10)),
        ("bytes=10-", slice(10, None)),
        ("bytes=-10", slice(-10, None)),
        ("bytes=5-99999999", slice(5, None)),
        ("bytes=-99999999", slice(0, None)),
    ],
)
def test_a_range_gives_those_bytes(server: Server, clip: str, header: str, part: slice) -> None:
    whole = server.http.get(f"/v1/videos/{clip}/content").content
    answer = server.http.get(f"/v1/videos/{clip}/content", headers={"range": header})
    start, stop, _ = part.indices(len(whole))
    assert (answer.status_code, answer.content) == (206, whole[part])
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"
    assert answer.headers["content-length"] == str(stop - start)


@pytest.mark.parametrize("header", ["bytes=99999999-", "bytes=-0"])
def test_a_range_outside_of_the_file_is_refused_with_its_size(server: Server, clip: str, header: str) -> None:
    size = len(server.http.get(f"/v1/videos/{clip}/content").content)
    answer = server.http.get(f"/v1/videos/{clip}/content", headers={"range": header})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")


@pytest.mark.parametrize(
    "header",
    ["bytes=9-5", "bytes=a-b", "bytes=-", "pages=1-2", "bytes=0-1,4-5", f"bytes={'9' * 5000}-", f"bytes=-{'9' * 5000}"],
)
def test_a_range_that_means_nothing_gives_the_whole_file(server: Server, clip: str, header: str) -> None:
    answer = server.http.get(f"/v1/videos/{clip}/content", headers={"range": header})
    assert answer.status_code == 200
    assert answer.headers["accept-ranges"] == "bytes"


def test_head_tells_the_size_without_the_bytes(server: Server, clip: str) -> None:
    whole = server.http.get(f"/v1/videos/{clip}/content").content
    answer = server.http.head(f"/v1/videos/{clip}/content", headers={"range": "bytes=1-2"})
    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, str(len(whole)), b"")


def test_a_cached_copy_and_a_resumed_download_are_told_apart_by_etag(server: Server, clip: str) -> None:
    url = f"/v1/videos/{clip}/content"
    etag = server.http.get(url).headers["etag"]
    assert server.http.get(url, headers={"if-none-match": etag}).status_code == 304
    assert server.http.get(url, headers={"if-none-match": "*"}).status_code == 304
    assert server.http.get(url, headers={"range": "bytes=1-2", "if-range": etag}).status_code == 206
    assert server.http.get(url, headers={"range": "bytes=1-2", "if-range": '"other"'}).status_code == 200
    assert server.http.get(url, params={"variant": "thumbnail"}).headers["etag"] != etag
