"""OpenAI's Python client on every route, strict: it raises for any response that OpenAI's own types do not allow."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from openai import BadRequestError, NotFoundError
from openai.types import Video

from tests.e2e.pictures import decoded_frames, opened, picture
from tests.e2e.server import Server

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

PICTURE: dict[str, Any] = {"prompt": "a calico cat", "size": "64x64", "extra_body": {"num_inference_steps": 3}}

VIDEO: dict[str, Any] = {
    "prompt": "a calico cat",
    # One of the four sizes that the strict client allows in a response; one frame is as much work as a small video.
    "size": "1280x720",
    "extra_body": {"num_inference_steps": 1, "num_frames": 1},
}


def decoded(b64_json: str | None) -> bytes:
    assert b64_json is not None
    return b64decode(b64_json, validate=True)


def only_value(headers: Any, name: str) -> str:
    (value,) = headers.get_list(name)
    return value


# Images.


def test_images_generate(server: Server) -> None:
    answer = server.openai().images.generate(**PICTURE, n=2, output_format="webp", quality="high", user="someone")
    assert [opened(decoded(image.b64_json)).size for image in answer.data or []] == [(64, 64)] * 2
    assert (answer.size, answer.output_format) == ("64x64", "webp")


@pytest.mark.parametrize("partial_images", [None, 0, 2])
def test_images_generate_as_a_stream(server: Server, partial_images: int | None) -> None:
    with server.openai().images.generate(**PICTURE, stream=True, partial_images=partial_images) as stream:
        *partial, completed = stream
    assert [event.type for event in partial] == ["image_generation.partial_image"] * (partial_images or 0)
    assert completed.type == "image_generation.completed"
    assert all(opened(decoded(event.b64_json)).size == (64, 64) for event in (*partial, completed))


def test_images_edit(server: Server) -> None:
    answer = server.openai().images.edit(**PICTURE, image=("cat.png", picture(), "image/png"))
    assert opened(decoded(answer.data[0].b64_json)).size == (64, 64)


def test_images_edit_of_one_among_several_pictures(painter: Server) -> None:
    with pytest.raises(BadRequestError) as raised:
        painter.openai().images.edit(**PICTURE, image=[picture(), picture()])
    assert raised.value.param == "image"
    assert "at most 1 input image" in raised.value.message


def test_images_edit_as_a_stream(server: Server) -> None:
    with server.openai().images.edit(**PICTURE, image=picture(), stream=True, partial_images=1) as stream:
        assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_images_edit_with_a_mask_where_the_model_can(painter: Server) -> None:
    answer = painter.openai().images.edit(**PICTURE, image=picture(), mask=picture(mode="RGBA"))
    assert opened(decoded(answer.data[0].b64_json)).size == (64, 64)


def test_images_edit_with_a_mask_where_the_model_cannot(server: Server) -> None:
    with pytest.raises(BadRequestError) as raised:
        server.openai().images.edit(**PICTURE, image=picture(), mask=picture(mode="RGBA"))
    assert raised.value.param == "mask"
    assert "It can do: image_edit, image_to_video, text_to_image, text_to_video" in raised.value.message


# Videos.


@pytest.fixture(scope="module")
def video(server: Server) -> Iterator[Video]:
    """A finished video that started from an image, made with `create_and_poll`."""
    client = server.openai()
    reference = ("first-frame.png", picture((1280, 720)), "image/png")
    video = client.videos.create_and_poll(**VIDEO, seconds="4", model="sora-2", input_reference=reference)
    yield video
    client.videos.delete(video.id)


def test_videos_create_and_poll(video: Video) -> None:
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.size, video.seconds, video.prompt) == ("1280x720", "1", "a calico cat")


def test_videos_retrieve(server: Server, video: Video) -> None:
    assert server.openai().videos.retrieve(video.id) == video


def test_videos_list_page_by_page(server: Server, video: Video) -> None:
    client = server.openai()
    newer = client.videos.create(**VIDEO)
    try:
        first = client.videos.list(limit=1)
        assert (first.data[0].id, first.has_more) == (newer.id, True)
        second = client.videos.list(limit=1, after=newer.id)
        assert second.first_id == second.last_id == second.data[0].id
        assert first.get_next_page().data == second.data
    finally:
        client.videos.delete(newer.id)


def test_videos_delete(server: Server) -> None:
    client = server.openai()
    video = client.videos.create(**VIDEO)
    assert video.status == "queued"
    deleted = client.videos.delete(video.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (video.id, "video.deleted", True)
    for call in (client.videos.retrieve, client.videos.download_content, client.videos.delete):
        with pytest.raises(NotFoundError):
            call(video.id)


def test_videos_download_content(server: Server, video: Video) -> None:
    download = server.openai().videos.download_content
    (frame,) = decoded_frames(download(video.id).read())
    assert (frame.width, frame.height) == (1280, 720)
    assert download(video.id, variant="video").read() == download(video.id).read()
    assert opened(download(video.id, variant="thumbnail").read()).format == "WEBP"
    assert opened(download(video.id, variant="spritesheet").read()).format == "JPEG"


# Models, ids.


def test_models(server: Server, painter: Server) -> None:
    for client in (server.openai(), painter.openai()):
        (model,) = client.models.list()
        assert client.models.retrieve(model.id) == model
    assert "/" in model.id  # the painter's path, percent-encoded by the client


def test_every_answer_has_one_request_id(server: Server) -> None:
    client = server.openai()
    for answer in (
        client.models.with_raw_response.list(),
        client.images.with_raw_response.generate(**PICTURE),
        client.images.with_raw_response.edit(**PICTURE, image=picture()),
        client.videos.with_raw_response.create(**VIDEO),
    ):
        assert answer.request_id == only_value(answer.headers, "x-request-id")
    client.videos.delete(answer.parse().id)
    own = f"mine-{uuid4().hex}"
    answer = client.models.with_raw_response.list(extra_headers={"x-request-id": own})
    assert only_value(answer.headers, "x-request-id") == own
    with pytest.raises(BadRequestError) as raised:
        client.images.generate(prompt="p", size="enormous")
    assert raised.value.request_id == only_value(raised.value.response.headers, "x-request-id")


# The asynchronous client.


async def test_the_asynchronous_client_on_every_route(server: Server) -> None:
    async with server.async_openai() as client:
        (model,) = (await client.models.list()).data
        assert await client.models.retrieve(model.id) == model

        generated, edited = await asyncio.gather(
            client.images.generate(**PICTURE), client.images.edit(**PICTURE, image=picture())
        )
        assert opened(decoded(generated.data[0].b64_json)).size == (64, 64)
        assert opened(decoded(edited.data[0].b64_json)).size == (64, 64)

        stream = await client.images.generate(**PICTURE, stream=True, partial_images=1)
        assert [event.type async for event in stream] == [
            "image_generation.partial_image",
            "image_generation.completed",
        ]

        video = await client.videos.create_and_poll(**VIDEO)
        assert video.status == "completed"
        assert await client.videos.retrieve(video.id) == video
        assert (await client.videos.list(limit=1)).data == [video]
        content = await client.videos.download_content(video.id)
        assert len(decoded_frames(await content.aread())) == 1
        assert (await client.videos.delete(video.id)).deleted
        with pytest.raises(NotFoundError):
            await client.videos.retrieve(video.id)


async def test_requests_at_the_same_time_are_answered_each_with_its_own(server: Server) -> None:
    async with server.async_openai() as client:
        body = {"num_inference_steps": 1}
        together = await asyncio.gather(
            *(client.images.generate(**{**PICTURE, "extra_body": {**body, "seed": seed}}) for seed in range(4))
        )
    for seed, answer in enumerate(together):
        assert decoded(answer.data[0].b64_json) == server.picture(num_inference_steps=1, seed=seed)
