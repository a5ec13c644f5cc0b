"""What a request may ask for and upload when the server was given limits of its own."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import numpy as np
import pytest

from deployments.api.body import MAX_TEXT_BYTES
from deployments.api.jobs import MAX_SIDE
from deployments.api.multipart import MAX_PARTS
from pipelines.media.encode import encode_image, encode_video
from tests.deployments.api.small_server import client, running_app
from tests.e2e.pictures import picture

PICTURE = picture()

LIMITS = {"max_pixels": 64 * 64, "max_frames": 16, "max_upload_bytes": len(PICTURE)}


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    async with running_app(tmp_path, **LIMITS) as (app, _), client(app) as http:
        yield http


def refused(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["param"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "64x65"}, "size"),
        ({"size": "64x64", "width": 65}, "width"),
        ({"height": 65}, "height"),
        ({"size": "257x1"}, "size"),
        ({"num_frames": 17}, "num_frames"),
        ({"seconds": 2, "fps": 9}, "seconds"),
        ({"seconds": "1e300"}, "seconds"),
        ({"seconds": 1e308, "fps": 24}, "seconds"),
        ({"n": 11}, "n"),
    ],
)
async def test_beyond_a_limit_is_a_400_by_name(http: httpx2.AsyncClient, fields: dict, param: str) -> None:
    assert refused(await http.post("/v1/videos", json={"prompt": "p", **fields})) == (400, param)
    if param not in ("num_frames", "seconds"):
        assert refused(await http.post("/v1/images/generations", json={"prompt": "p", **fields})) == (400, param)


@pytest.mark.parametrize(
    "fields", [{"size": "64x64", "num_frames": 16, "n": 10}, {"seconds": 2, "fps": 8}, {"size": "256x1"}]
)
async def test_up_to_a_limit_is_accepted(http: httpx2.AsyncClient, fields: dict) -> None:
    assert (await http.post("/v1/videos", json={"prompt": "p", **fields})).status_code == 200


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg", "mp4"])
@pytest.mark.parametrize("size", [(MAX_SIDE, 1), (1, MAX_SIDE)])
def test_the_longest_side_fits_into_every_format(output_format: str, size: tuple[int, int]) -> None:
    frame = np.zeros((*size, 3), np.uint8)
    assert encode_video([frame], fps=16) if output_format == "mp4" else encode_image(frame, output_format)


async def test_a_longer_side_is_refused(tmp_path: Path) -> None:
    async with running_app(tmp_path) as (app, _), client(app) as http:
        for route in ("images/generations", "videos"):
            for fields, param in (
                ({"size": f"{MAX_SIDE}x16"}, None),
                ({"size": f"{MAX_SIDE + 1}x16"}, "size"),
                ({"width": 8_294_400, "height": 1}, "width"),
            ):
                answer = await http.post(f"/v1/{route}", json={"prompt": "p", **fields})
                assert param is None or refused(answer) == (400, param)
                assert param is not None or answer.status_code == 200


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("images/generations", {"size": "1x1"}, "size"),
        ("images/generations", {"size": "48x16"}, "size"),
        ("images/generations", {"width": 16, "height": 48}, "width"),
        ("images/generations", {"size": "49x16"}, None),
        ("images/generations", {"size": "17x17"}, None),
        ("videos", {"size": "16x16", "num_frames": 3}, "size"),
        ("videos", {"size": "16x16", "num_frames": 4}, None),
    ],
)
async def test_each_rank_needs_a_token(tmp_path: Path, route: str, fields: dict, param: str | None) -> None:
    async with running_app(tmp_path, num_gpus=4, ulysses_degree=2) as (app, _), client(app) as http:
        answer = await http.post(f"/v1/{route}", json={"prompt": "p", **fields})
    if param is None:
        assert answer.status_code == 200
    else:
        assert refused(answer) == (400, param)
        assert "fewer than the 4 ranks" in answer.json()["error"]["message"]


async def test_a_picture_as_large_as_allowed_is_accepted_and_one_byte_more_is_not(http: httpx2.AsyncClient) -> None:
    for extra, status in ((b"", 200), (b"x", 413)):
        data = PICTURE + extra
        reference = {"image_url": f"data:image/png;base64,{b64encode(data).decode()}"}
        for answer in (
            await http.post("/v1/videos", data={"prompt": "p"}, files={"input_reference": data}),
            await http.post("/v1/videos", json={"prompt": "p", "input_reference": reference}),
            await http.post("/v1/images/edits", data={"prompt": "p"}, files={"image": data}),
        ):
            assert answer.status_code == status, answer.text
            assert status == 200 or answer.json()["error"]["code"] == "file_too_large"


@pytest.mark.parametrize(
    ("form", "status", "code"),
    [
        (b"prompt=" + b"%41" * (MAX_TEXT_BYTES // 3), 413, "request_too_large"),
        (b"prompt=p" + b"&a" * MAX_PARTS, 400, "invalid_form"),
    ],
)
async def test_a_urlencoded_form_has_room_for_texts_alone(
    http: httpx2.AsyncClient, form: bytes, status: int, code: str
) -> None:
    kind = {"content-type": "application/x-www-form-urlencoded"}
    answer = await http.post("/v1/videos", content=form, headers=kind)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/videos", "/v1/images/generations", "/v1/set_lora"])
@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=B", "text/plain"])
async def test_an_upload_without_end_is_refused_long_before_it(
    http: httpx2.AsyncClient, path: str, content_type: str
) -> None:
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--B\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        while True:
            sent += 2**16
            yield bytes(2**16)

    answer = await http.post(path, content=body(), headers={"content-type": content_type})
    assert answer.status_code == 413
    assert sent < 2 * 2**20
