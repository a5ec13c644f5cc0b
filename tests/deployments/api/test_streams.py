"""`stream=true`: pictures as server-sent events, and what happens to a client that leaves."""

from __future__ import annotations

import json
import time
from base64 import b64decode

import httpx
import pytest

from tests.deployments.api.conftest import Server, opened, picture


@pytest.mark.parametrize("previews", [0, 1, 3])
def test_previews_come_before_the_picture(images: Server, previews: int) -> None:
    events = list(images.openai().images.generate(prompt="p", stream=True, partial_images=previews))
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * previews,
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:-1]] == list(range(previews))
    for event in events:
        image = opened(b64decode(event.b64_json))
        assert event.size == f"{image.width}x{image.height}"


def test_an_edit_streams_events_of_its_own_name(images: Server) -> None:
    events = list(images.openai().images.edit(image=picture(), prompt="p", stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_the_streamed_picture_is_the_plain_one(images: Server) -> None:
    client = images.openai()
    plain = client.images.generate(prompt="p", extra_body={"seed": 4})
    (event,) = client.images.generate(prompt="p", stream=True, extra_body={"seed": 4})
    assert event.b64_json == plain.data[0].b64_json


def test_n_streamed_pictures_complete_one_after_the_other(images: Server) -> None:
    events = list(images.openai().images.generate(prompt="p", stream=True, n=2, extra_body={"seed": 4}))
    assert [event.model_extra["seed"] for event in events] == [4, 5]


def test_every_step_is_a_comment_so_that_the_line_is_never_silent(images: Server) -> None:
    body = {"prompt": "p", "stream": True, "num_inference_steps": 3}
    with images.http.stream("POST", "/v1/images/generations", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = list(answer.iter_lines())
    assert [line for line in lines if line.startswith(":")] == [f": step {i} of 3" for i in (1, 2, 3)]
    (data,) = (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))
    assert data["usage"]["total_tokens"] == 0


def test_a_stream_that_is_refused_is_a_plain_error(images: Server) -> None:
    answer = images.http.post("/v1/images/generations", json={"prompt": "p", "stream": True, "n": 11})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "n"


LONG = {"prompt": "p", "n": 10, "num_inference_steps": 1000}


def assert_engine_is_free(server: Server) -> None:
    """The abandoned job has ten times 1000 steps; the next one must not wait for them."""
    started = time.monotonic()
    assert server.http.post("/v1/images/generations", json={"prompt": "p", "num_inference_steps": 1}).is_success
    assert time.monotonic() - started < 5


def test_a_client_that_gives_up_waiting_frees_the_engine(images: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{images.base_url}/v1/images/generations", json=LONG, timeout=0.3)
    assert_engine_is_free(images)


def test_a_client_that_leaves_a_stream_frees_the_engine(images: Server) -> None:
    with images.http.stream("POST", "/v1/images/generations", json={**LONG, "stream": True}) as answer:
        assert next(answer.iter_lines()) == ": step 1 of 10000"
    assert_engine_is_free(images)
