"""`/v1/videos`, as clients use it."""

from __future__ import annotations

import io
import json
import time
from base64 import b64encode
from typing import Any
from urllib.parse import urlencode

import av
import pytest
from openai import NotFoundError

from tests.deployments.api.conftest import Server, opened, picture

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

FAST = {"num_inference_steps": 1}


def created(server: Server, **fields: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/videos", json={"prompt": "p", **FAST, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def finished(server: Server, video_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        video = server.http.get(f"/v1/videos/{video_id}").json()
        if video["status"] in ("completed", "failed"):
            return video
        time.sleep(0.02)
    raise TimeoutError(video)


@pytest.fixture(scope="module")
def clip(serve: Any) -> str:
    """The id of a finished pair of clips."""
    server = serve("videos")
    return finished(server, created(server, n=2, seed=1)["id"])["id"]


def test_openais_client_makes_watches_downloads_and_deletes_a_video(videos: Server) -> None:
    client = videos.openai()
    # 1280x720 is one of the four sizes that the strict client allows.
    video = client.videos.create_and_poll(
        prompt="a calico cat", size="1280x720", seconds="4", extra_body={"num_frames": 3, **FAST}
    )
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    frames = decoded_frames(client.videos.download_content(video.id).read())
    assert len(frames) == 3
    assert (frames[0].width, frames[0].height) == (1280, 720)
    assert client.videos.list(limit=1).data == [video]
    assert client.videos.delete(video.id).deleted is True
    with pytest.raises(NotFoundError):
        client.videos.retrieve(video.id)


def decoded_frames(data: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(data)) as container:
        return list(container.decode(video=0))


def test_a_prompt_alone_gives_the_models_default_clip(videos: Server) -> None:
    video = created(videos)
    frames = decoded_frames(videos.http.get(f"/v1/videos/{finished(videos, video['id'])['id']}/content").content)
    assert len(frames) == video["num_frames"]
    assert f"{frames[0].width}x{frames[0].height}" == video["size"]


def test_the_object_has_every_key_and_null_where_there_is_nothing(videos: Server) -> None:
    video = created(videos)
    for key in ("completed_at", "expires_at", "remixed_from_video_id", "error"):
        assert video[key] is None
    assert video["object"] == "video"
    assert video["prompt"] == "p"
    assert video["status"] == "queued"
    assert video["progress"] == 0


@pytest.mark.parametrize("seconds", [2, "2", 2.0])
def test_seconds_may_be_a_number_or_a_text_and_are_told_as_a_text(videos: Server, seconds: Any) -> None:
    video = created(videos, seconds=seconds, fps=10)
    assert (video["seconds"], video["num_frames"], video["fps"]) == ("2", 20, 10)


def test_num_frames_overrides_seconds(videos: Server) -> None:
    assert created(videos, seconds=4, num_frames=5)["num_frames"] == 5


@pytest.mark.parametrize("encoding", ["json", "multipart", "urlencoded"])
def test_every_encoding_means_the_same(videos: Server, encoding: str) -> None:
    fields = {
        "prompt": "a cat & a dög",
        "seconds": "1",
        "fps": "4",
        "seed": "7",
        "size": "32x32",
        "guidance_scale": "2",
    }
    match encoding:
        case "json":
            answer = videos.http.post("/v1/videos", json=fields)
        case "multipart":
            answer = videos.http.post("/v1/videos", files={name: (None, value) for name, value in fields.items()})
        case _:
            answer = videos.http.post("/v1/videos", data=fields)
    video = answer.json()
    assert (video["prompt"], video["num_frames"], video["seeds"], video["size"]) == ("a cat & a dög", 4, [7], "32x32")


def test_extra_body_reaches_the_job_through_openais_multipart(videos: Server, adapters: tuple[str, str]) -> None:
    client = videos.openai(strict=False)
    extra = {"seed": [3, 4], "negative_prompt": "", "fps": 5, "lora": [{"path": path} for path in adapters], **FAST}
    video = client.videos.create(prompt="p", extra_body=extra)
    assert video.model_extra["seeds"] == [3, 4]
    assert video.model_extra["fps"] == 5
    assert video.model_extra["n"] == 2


def test_a_structure_may_be_json_text_in_a_form(videos: Server, adapters: tuple[str, str]) -> None:
    loras = json.dumps([{"nickname": "first", "path": adapters[0], "strength": 0.5}, {"path": adapters[1]}])
    body = urlencode({"prompt": "p", "lora": loras, "num_inference_steps": 1})
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert videos.http.post("/v1/videos", content=body, headers=headers).status_code == 200


def test_an_adapter_of_the_requests_own_changes_the_clip(videos: Server, adapters: tuple[str, str]) -> None:
    clips = []
    for lora in ([], {"path": adapters[0]}):
        video = finished(videos, created(videos, seed=1, lora=lora)["id"])
        clips.append(videos.http.get(f"/v1/videos/{video['id']}/content").content)
    assert clips[0] != clips[1]


def test_input_reference_starts_a_clip(animation: Server) -> None:
    client = animation.openai(strict=False)
    assert client.videos.create(prompt="p", input_reference=picture(), extra_body=FAST).status == "queued"
    url = "data:image/png;base64," + b64encode(picture()).decode()
    for reference in (url, {"image_url": url}):
        created(animation, input_reference=reference)
    nested = {"input_reference[image_url]": url, "prompt": "p"}
    assert animation.http.post("/v1/videos", data=nested).status_code == 200


def test_an_unfinished_video_tells_when_to_ask_again_and_has_no_content(videos: Server) -> None:
    video = created(videos, num_inference_steps=1000, n=10)
    answer = videos.http.get(f"/v1/videos/{video['id']}")
    assert int(answer.headers["openai-poll-after-ms"]) > 0
    assert answer.json()["progress"] < 100
    assert videos.http.get(f"/v1/videos/{video['id']}/content").status_code == 404
    assert videos.http.delete(f"/v1/videos/{video['id']}").json() == {
        "id": video["id"],
        "object": "video.deleted",
        "deleted": True,
    }


def test_deleting_a_running_video_frees_the_engine(videos: Server) -> None:
    long = created(videos, num_inference_steps=1000, n=10)
    started = time.monotonic()
    videos.http.delete(f"/v1/videos/{long['id']}")
    finished(videos, created(videos)["id"])
    assert time.monotonic() - started < 5


def test_progress_is_whole_and_never_falls(videos: Server) -> None:
    video = created(videos, num_inference_steps=100)
    seen = [video["progress"]]
    while seen[-1] < 100:
        seen.append(videos.http.get(f"/v1/videos/{video['id']}").json()["progress"])
    assert seen == sorted(seen)
    assert len(set(seen)) > 2
    assert all(type(progress) is int for progress in seen)


def test_a_list_is_walked_page_by_page_in_either_order(videos: Server) -> None:
    made = [created(videos)["id"] for _ in range(3)]
    client = videos.openai(strict=False)
    newest = [video.id for video in client.videos.list(limit=2)]
    assert newest[:3] == made[::-1]
    assert [video.id for video in client.videos.list(limit=2, order="asc")] == newest[::-1]
    page = videos.http.get("/v1/videos", params={"limit": 2}).json()
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (made[2], made[1])
    assert videos.http.get("/v1/videos", params={"after": newest[-1]}).json()["data"] == []


def test_the_same_idempotency_key_gives_the_same_video(videos: Server) -> None:
    ids = [
        videos.http.post("/v1/videos", json={"prompt": "p", **FAST}, headers={"Idempotency-Key": key}).json()["id"]
        for key in ("a", "a", "b")
    ]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("variant", "media_type"), [("video", "video/mp4"), ("thumbnail", "image/webp"), ("spritesheet", "image/jpeg")]
)
def test_each_variant_is_a_file_of_its_own_type(videos: Server, clip: str, variant: str, media_type: str) -> None:
    answer = videos.http.get(f"/v1/videos/{clip}/content", params={"variant": variant})
    assert answer.headers["content-type"] == media_type
    assert decoded_frames(answer.content) if variant == "video" else opened(answer.content)


def test_further_clips_are_variants_by_number(videos: Server, clip: str) -> None:
    files = [videos.http.get(f"/v1/videos/{clip}/content", params={"variant": i}).content for i in (0, 1)]
    assert files[0] != files[1]
    assert files[1] == videos.http.get(f"/v1/videos/{clip}/content", params={"variant": "video", "index": 1}).content
    assert videos.http.get(f"/v1/videos/{clip}/content", params={"variant": 2}).status_code == 404


def test_a_download_offers_a_name_and_no_path(videos: Server, clip: str) -> None:
    answer = videos.http.get(f"/v1/videos/{clip}/content")
    assert f"{clip}.mp4" in answer.headers["content-disposition"]
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
def test_a_range_gives_those_bytes(videos: Server, clip: str, header: str, part: slice) -> None:
    whole = videos.http.get(f"/v1/videos/{clip}/content").content
    answer = videos.http.get(f"/v1/videos/{clip}/content", headers={"range": header})
    start, stop, _ = part.indices(len(whole))
    assert (answer.status_code, answer.content) == (206, whole[part])
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"
    assert answer.headers["content-length"] == str(stop - start)


@pytest.mark.parametrize("header", ["bytes=99999999-", "bytes=-0"])
def test_a_range_outside_of_the_file_is_refused_with_its_size(videos: Server, clip: str, header: str) -> None:
    size = len(videos.http.get(f"/v1/videos/{clip}/content").content)
    answer = videos.http.get(f"/v1/videos/{clip}/content", headers={"range": header})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")


@pytest.mark.parametrize("header", ["bytes=9-5", "bytes=a-b", "bytes=-", "pages=1-2", "bytes=0-1,4-5"])
def test_a_range_that_means_nothing_gives_the_whole_file(videos: Server, clip: str, header: str) -> None:
    answer = videos.http.get(f"/v1/videos/{clip}/content", headers={"range": header})
    assert answer.status_code == 200
    assert answer.headers["accept-ranges"] == "bytes"


def test_head_tells_the_size_without_the_bytes(videos: Server, clip: str) -> None:
    whole = videos.http.get(f"/v1/videos/{clip}/content").content
    answer = videos.http.head(f"/v1/videos/{clip}/content")
    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, str(len(whole)), b"")


def test_a_cached_copy_and_a_resumed_download_are_told_apart_by_etag(videos: Server, clip: str) -> None:
    url = f"/v1/videos/{clip}/content"
    etag = videos.http.get(url).headers["etag"]
    assert videos.http.get(url, headers={"if-none-match": etag}).status_code == 304
    assert videos.http.get(url, headers={"range": "bytes=1-2", "if-range": etag}).status_code == 206
    assert videos.http.get(url, headers={"range": "bytes=1-2", "if-range": '"other"'}).status_code == 200
    assert videos.http.get(url, params={"variant": "thumbnail"}).headers["etag"] != etag
