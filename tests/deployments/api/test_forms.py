"""Forms as browsers and SDKs write them, each in its own way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from tests.deployments.api.small_server import client, running_app
from tests.e2e.pictures import picture

FORM = "multipart/form-data; boundary=B"


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    async with running_app(tmp_path) as (app, _), client(app) as http:
        yield http


def form(*parts: tuple[str, bytes]) -> bytes:
    """A multipart body of these parts: for each, what follows `form-data; ` in its header, and its data."""
    encoded = [b"--B\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + data for head, data in parts]
    return b"\r\n".join([*encoded, b"--B--\r\n"])


@pytest.mark.parametrize("field", ["input_reference", "mask"])
async def test_a_file_input_that_was_left_empty_is_none(http: httpx2.AsyncClient, field: str) -> None:
    route = "/v1/videos" if field == "input_reference" else "/v1/images/edits"
    parts = [('name="prompt"', b"p"), ('name="image"; filename="a.png"', picture())]
    for head, status in ((f'name="{field}"; filename=""', 200), (f'name="{field}"; filename="a.png"', 400)):
        answer = await http.post(route, content=form(*parts, (head, b"")), headers={"content-type": FORM})
        assert answer.status_code == status, answer.text


@pytest.mark.parametrize("name", ["input_reference", "input_reference[]"])
async def test_one_file_may_be_named_as_a_list(http: httpx2.AsyncClient, name: str) -> None:
    answer = await http.post("/v1/videos", data={"prompt": "p"}, files={name: picture((96, 32))})
    assert (answer.status_code, answer.json().get("size")) == (200, "96x32")


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("Multipart/Form-Data; boundary=B", form(('name="prompt"', b"a cat"))),
        ("APPLICATION/X-WWW-FORM-URLENCODED", b"prompt=a+cat"),
        ("Application/JSON", b'{"prompt": "a cat"}'),
    ],
)
async def test_media_types_have_no_case(http: httpx2.AsyncClient, content_type: str, body: bytes) -> None:
    answer = await http.post("/v1/videos", content=body, headers={"content-type": content_type})
    assert (answer.status_code, answer.json().get("prompt")) == (200, "a cat")


async def test_an_empty_idempotency_key_is_none(http: httpx2.AsyncClient) -> None:
    answers = [
        await http.post("/v1/videos", json={"prompt": prompt}, headers={"idempotency-key": ""}) for prompt in "ab"
    ]
    assert [answer.json()["prompt"] for answer in answers] == ["a", "b"]
