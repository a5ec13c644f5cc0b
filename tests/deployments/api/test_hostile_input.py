"""Nothing that a client writes becomes the name of a file that is written or opened."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest

from tests.deployments.api.small_server import client, running_app
from tests.e2e.pictures import picture

MARK = "chosen-by-the-client"

NAMES = [
    f"/tmp/{MARK}.png",
    f"../../{MARK}.png",
    f"..\\..\\{MARK}.png",
    f"C:\\{MARK}.png",
    f"file:///{MARK}",
    f"~/{MARK}",
    f"{MARK}\x00.png",
    f"%2e%2e%2f{MARK}",
]

_opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.listdir", "os.scandir"):
        _opened.append(str(arguments[0]))


sys.addaudithook(_note)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """What this process opens, creates, renames, deletes or lists during the test."""
    global _opened
    _opened = []
    yield _opened
    _opened = None


@pytest.fixture
async def http(tmp_path: Path, opened: list[str]) -> AsyncIterator[httpx2.AsyncClient]:
    async with running_app(tmp_path) as (app, _), client(app) as http:
        yield http


@pytest.fixture(autouse=True)
def no_trace(opened: list[str], tmp_path: Path) -> Iterator[None]:
    yield
    assert any("jobs.sqlite3" in name or "outputs" in name for name in opened)  # so `opened` does record
    assert not [name for name in opened if MARK in name]
    assert not [path for path in tmp_path.rglob("*") if MARK in str(path)]


@pytest.mark.parametrize("name", NAMES)
async def test_the_name_of_an_upload(http: httpx2.AsyncClient, name: str) -> None:
    files = {"image": (name, picture(), "image/png")}
    form = {"prompt": "p", "response_format": "url"}
    answer = await http.post("/v1/images/edits", data=form, files=files)
    assert answer.status_code == 200, answer.text
    assert MARK not in answer.text
    download = await http.get(answer.json()["data"][0]["url"])
    assert download.status_code == 200
    assert MARK not in download.headers["content-disposition"]
    answer = await http.post("/v1/videos", data={"prompt": "p"}, files={"input_reference": (name, picture())})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("name", NAMES)
async def test_a_field_that_could_be_taken_for_a_path(http: httpx2.AsyncClient, name: str) -> None:
    for field in ("model", "user", "size", "output_format", "response_format", "output_path", "id", "negative_prompt"):
        await http.post("/v1/videos", json={"prompt": "p", field: name})
        await http.post("/v1/images/generations", json={"prompt": name, field: name})
    for reference in (name, {"image_url": name}, {"file_id": name}):
        for fields, path in (({"images": [reference]}, "edits"), ({"image": reference, "mask": name}, "edits")):
            assert (await http.post(f"/v1/images/{path}", json={"prompt": "p", **fields})).status_code == 400
        assert (await http.post("/v1/videos", json={"prompt": "p", "input_reference": reference})).status_code == 400


@pytest.mark.parametrize("name", NAMES)
async def test_an_id_or_a_header(http: httpx2.AsyncClient, name: str) -> None:
    identifier = quote(name, safe="")
    for path in (f"/v1/videos/{identifier}", f"/v1/videos/{identifier}/content", f"/v1/images/{identifier}/content"):
        assert (await http.get(path)).status_code == 404
    await http.get("/v1/videos", params={"after": name})
    headers = {"idempotency-key": name.replace("\x00", ""), "x-request-id": name.replace("\x00", "")}
    assert (await http.post("/v1/videos", json={"prompt": "p"}, headers=headers)).status_code == 200
