"""Tiny models of every family, loaded once per session, and jobs for them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from configs.server_args import ServerArgs
from pipelines.job import Job, Media, Task, content_key
from pipelines.model.load import Model, load_model
from tests import tiny_models

WIDTH, HEIGHT = 60, 50
"""Not multiples of any size in which a model computes."""


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("tiny_models")
    return lambda name: tiny_models.save(name, directory)


@pytest.fixture(scope="session")
def tiny_model(tiny_model_path: Callable[[str], Path]) -> Callable[[str], Model]:
    """Loads a model by name; the same name gives the same model, so no test may change it."""
    return cache(lambda name: load_model(ServerArgs(model_path=str(tiny_model_path(name)), device="cpu", dtype="fp32")))


@pytest.fixture(autouse=True)
def small_reference_images() -> Iterator[None]:
    with tiny_models.small_reference_images():
        yield


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def picture(color: str = "crimson") -> bytes:
    """An image larger than the output, of another shape, whose colours vary."""
    image = Image.linear_gradient("L").resize((90, 70))
    return png(Image.composite(Image.new("RGB", image.size, color), Image.new("RGB", image.size, "white"), image))


def mask() -> bytes:
    """As large as `picture`: the left half is to be edited."""
    image = Image.new("RGBA", (90, 70), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 45, 70))
    return png(image)


def make_job(model: Model, task: Task, **changes: Any) -> tuple[Job, Media]:
    """A small job of two steps with the family's defaults, and the media it needs."""
    values: dict[str, Any] = {
        **model.card.family.defaults_for(task).model_dump(),
        "id": "job",
        "task": task,
        "prompt": "a cat playing the piano",
        "width": WIDTH,
        "height": HEIGHT,
        "num_inference_steps": 2,
        "seeds": (1,),
    }
    if task.is_video:
        values |= {"num_frames": 6, "fps": 16, "output_format": "mp4"}
    media = {}
    if task in (Task.IMAGE_EDIT, Task.INPAINT, Task.IMAGE_TO_VIDEO):
        media[content_key(picture())] = picture()
        values |= {"images": (content_key(picture()),)}
    if task is Task.INPAINT:
        media[content_key(mask())] = mask()
        values |= {"mask": content_key(mask())}
    return Job(**{**values, **changes}), media
