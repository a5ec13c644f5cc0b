"""What a model cannot do is refused; the error names the parameter and what the model can do."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.job import Task
from tests.deployments.api.stand_in import StandInEngine, client_of
from tests.e2e.pictures import picture

PICTURES = (Task.TEXT_TO_IMAGE, Task.IMAGE_EDIT)
CLIPS = (Task.TEXT_TO_VIDEO,)
ANIMATIONS = (Task.IMAGE_TO_VIDEO,)

GENERATION: tuple[str, dict[str, Any]] = ("/v1/images/generations", {"json": {"prompt": "p"}})
EDIT: tuple[str, dict[str, Any]] = ("/v1/images/edits", {"data": {"prompt": "p"}, "files": {"image": picture()}})
INPAINT: tuple[str, dict[str, Any]] = (
    "/v1/images/edits",
    {"data": {"prompt": "p"}, "files": {"image": picture(), "mask": picture(mode="RGBA")}},
)
TWO_IMAGES: tuple[str, dict[str, Any]] = (
    "/v1/images/edits",
    {"data": {"prompt": "p"}, "files": [("image[]", picture()), ("image[]", picture())]},
)
VIDEO: tuple[str, dict[str, Any]] = ("/v1/videos", {"json": {"prompt": "p"}})


@pytest.mark.parametrize(
    ("tasks", "request_", "param", "words"),
    [
        (PICTURES, VIDEO, "model", "It can do: image_edit, text_to_image"),
        (PICTURES, INPAINT, "mask", "It can do: image_edit, text_to_image"),
        (PICTURES, TWO_IMAGES, "image", "at most 1 input image"),
        (CLIPS, GENERATION, None, "It can do: text_to_video"),
        (CLIPS, EDIT, "image", "It can do: text_to_video"),
        (ANIMATIONS, VIDEO, "input_reference", "It can do: image_to_video"),
    ],
)
async def test_a_request_beyond_the_model_is_told_what_the_model_can(
    tasks: tuple[Task, ...], request_: tuple[str, dict[str, Any]], param: str | None, words: str
) -> None:
    path, body = request_
    async with client_of(StandInEngine(*tasks)) as http:
        answer = await http.post(path, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("size", ["64x64", "832x480"])
async def test_a_text_to_video_model_refuses_input_reference_as_sglang_words_it(size: str) -> None:
    async with client_of(StandInEngine(*CLIPS)) as http:
        answer = await http.post("/v1/videos", json={"prompt": "p", "input_reference": "dummy", "size": size})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_reference")
    assert "input_reference is not supported" in answer.json()["detail"]
