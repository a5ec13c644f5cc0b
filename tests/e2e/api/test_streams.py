"""`stream=true`: images as server-sent events, and what happens when a client disconnects."""

from __future__ import annotations

import json
import time
from base64 import b64decode
from typing import Any

import httpx2
import pytest

from tests.e2e.pictures import opened, picture
from tests.e2e.server import SMALL, Server

PICTURE: dict[str, Any] = {"prompt": "p", "size": "64x64", "extra_body": {"num_inference_steps": 4, "seed": 4}}


@pytest.mark.parametrize("previews", [0, 1, 3])
def test_previews_come_before_the_picture(server: Server, previews: int) -> None:
    events = list(server.openai().images.generate(**PICTURE, stream=True, partial_images=previews))
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * previews,
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:-1]] == list(range(previews))
    for event in events:
        image = opened(b64decode(event.b64_json))
        assert event.size == f"{image.width}x{image.height}"


def test_an_edit_streams_events_of_its_own_name(server: Server) -> None:
    events = list(server.openai().images.edit(**PICTURE, image=picture(), stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_the_streamed_picture_is_the_plain_one(server: Server) -> None:
    client = server.openai()
    plain = client.images.generate(**PICTURE)
    (event,) = client.images.generate(**PICTURE, stream=True)
    assert event.b64_json == plain.data[0].b64_json


def test_n_streamed_pictures_complete_one_after_the_other(server: Server) -> None:
    events = list(server.openai().images.generate(**PICTURE, stream=True, n=2))
    assert [event.model_extra["seed"] for event in events] == [4, 5]


def test_steps_are_comments_so_that_the_line_is_never_silent(server: Server) -> None:
    body = {**SMALL, "stream": True, "num_inference_steps": 3}
    with server.http.stream("POST", "/v1/images/generations", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = list(answer.iter_lines())
    told = [line for line in lines if line.startswith(":")]
    assert told == [line for line in (f": step {i} of 3" for i in range(4)) if line in told]
    assert {": step 0 of 3", ": step 1 of 3", ": step 3 of 3"} <= {*told}  # steps within 0.1 s may be reported as one
    (data,) = (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))
    assert data["usage"]["total_tokens"] == 0


def test_a_stream_that_is_refused_is_a_plain_error(server: Server) -> None:
    answer = server.http.post("/v1/images/generations", json={"prompt": "p", "stream": True, "n": 11})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "n"


LONG = {**SMALL, "size": "256x256", "n": 10, "num_inference_steps": 1000}
"""10,000 steps: minutes on any CPU."""


def assert_engine_is_free(server: Server) -> None:
    started = time.monotonic()
    assert server.picture()
    assert time.monotonic() - started < 20


def test_a_client_that_gives_up_waiting_frees_the_engine(server: Server) -> None:
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{server.base_url}/v1/images/generations", json=LONG, timeout=1)
    assert_engine_is_free(server)


def test_a_client_that_leaves_a_stream_frees_the_engine(server: Server) -> None:
    with server.http.stream("POST", "/v1/images/generations", json={**LONG, "stream": True}) as answer:
        assert next(answer.iter_lines()) == ": step 0 of 10000"
    assert_engine_is_free(server)
