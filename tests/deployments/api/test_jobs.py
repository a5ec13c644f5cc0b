"""What a request may leave open: the size of an output."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from deployments.api.jobs import size_like
from tests.deployments.api.small_server import client, running_app
from tests.e2e.pictures import picture


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((512, 512), (1024, 1024)),
        ((3840, 2160), (1360, 768)),
        ((2160, 3840), (768, 1360)),
        ((10_000, 1), (1760, 576)),
        ((1, 10_000), (576, 1760)),
    ],
)
def test_an_output_has_the_shape_of_its_picture_and_at_most_the_area_of_the_default(
    image: tuple[int, int], size: tuple[int, int]
) -> None:
    assert size_like(image, (1024, 1024), multiple=16) == size


@pytest.mark.parametrize("default", [(832, 480), (1280, 704), (1024, 1024), (256, 256), (720, 1280)])
def test_a_picture_of_the_default_shape_gives_the_default_size(default: tuple[int, int]) -> None:
    for scale in range(1, 20):
        assert size_like((scale * default[0], scale * default[1]), default, multiple=16) == default


def test_no_side_is_less_than_the_model_can_compute() -> None:
    assert size_like((300, 100), (16, 16), multiple=16) == (16, 16)


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """A model whose default size is 64x64, in multiples of 16."""
    async with running_app(tmp_path) as (app, _), client(app) as http:
        yield http


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, "96x32"),
        ({"size": "auto"}, "96x32"),
        ({"size": "64x48"}, "64x48"),
        ({"height": 48}, "96x48"),
    ],
)
async def test_a_size_that_is_left_open_follows_the_picture(http: httpx2.AsyncClient, fields: dict, size: str) -> None:
    upload = {"image": picture((300, 100))}
    edited = await http.post("/v1/images/edits", data={"prompt": "p", **fields}, files=upload)
    assert edited.json()["size"] == size
    upload = {"input_reference": picture((300, 100))}
    video = await http.post("/v1/videos", data={"prompt": "p", **fields}, files=upload)
    assert video.json()["size"] == size


async def test_without_a_picture_it_is_the_default(http: httpx2.AsyncClient) -> None:
    made = await http.post("/v1/images/generations", json={"prompt": "p"})
    assert made.json()["size"] == "64x64"
