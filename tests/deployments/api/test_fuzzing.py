"""Anything sent to any route gets a prompt response that is documented and no 5xx.

Over real HTTP, with the real state. Each run of the suite tries the same few hundred requests; `make fuzz` tries
thousands of new ones.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import cache
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from configs.server_args import ServerArgs
from deployments.api.app import create_app
from tests.deployments.api.small_server import served_app

PATIENCE_S = 30.0
"""For one response, with an engine that computes nothing: longer is a hang."""

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

FRAMING = ("content-length", "transfer-encoding")
"""Headers that say where a message ends: uvicorn refuses wrong ones in plain text before it makes a request of them."""

# The OpenAPI document needs neither an engine nor a state.
schema = schemathesis.openapi.from_dict(create_app(ServerArgs(), None, None).openapi())


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served_app(tmp_path_factory.mktemp("server"), max_frames=100) as url:
        yield url


@pytest.fixture(scope="module")
def http(base_url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=base_url, timeout=PATIENCE_S) as client:
        yield client


@schema.parametrize()
def test_requests_made_from_the_document(case: schemathesis.Case, base_url: str) -> None:
    for name in [name for name in case.headers or () if name.lower() in FRAMING]:
        del case.headers[name]
    response = case.call(base_url=base_url, timeout=PATIENCE_S)
    is_stream = response.headers["content-type"][0].startswith("text/event-stream")
    # Like OpenAI's, the document describes the data of an event; Schemathesis takes that for the whole event.
    case.validate_response(response, checks=CHECKS, excluded_checks=[response_schema_conformance] * is_stream)
    if response.status_code >= 400:
        assert_envelope(response.json())


def assert_envelope(body: Any) -> None:
    assert set(body) == {"error", "detail"}
    assert set(body["error"]) == {"message", "type", "param", "code"}


def assert_answered(response: httpx2.Response) -> None:
    assert response.status_code < 500, response.text
    assert response.headers["x-request-id"]
    if response.status_code >= 400:
        assert_envelope(response.json())


ROUTES = st.sampled_from(
    ["/v1/images/generations", "/v1/images/edits", "/v1/videos", "/v1/set_lora", "/v1/merge_lora_weights"]
)

FIELDS = sorted(
    {
        name
        for model in ("ImageEditRequest", "VideoRequest", "SetLoRA", "MergeLoRA")
        for name in schema.raw_schema["components"]["schemas"][model]["properties"]
    }
)

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["4", "1e400", "[", "{}", "NaN", "\x00", "\ud800", "data:,", "http://a", "9" * 5000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(route=ROUTES, fields=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=6))
def test_any_value_in_any_field(http: httpx2.Client, route: str, fields: dict[str, Any]) -> None:
    body = as_json({"prompt": "p", **fields})
    assert_answered(http.post(route, content=body, headers={"content-type": "application/json"}))


def as_json(value: Any) -> bytes:
    """Encodes even what is not valid JSON: NaN and lone surrogates."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


NAMES = st.text(alphabet='[]ab."\\;\r\n é', max_size=12) | st.sampled_from(
    [*FIELDS, "image[]", "lora[][nickname]", "lora[][target][]", "input_reference[image_url]", "a[b][c][d][e]"]
)


@given(
    route=ROUTES,
    parts=st.lists(st.tuples(NAMES, st.booleans(), st.binary(max_size=40)), max_size=5),
    boundary=st.text(alphabet="-B", max_size=3),
    cut=st.integers(0, 60),
)
def test_any_multipart_body(http: httpx2.Client, route: str, parts: list, boundary: str, cut: int) -> None:
    body = b""
    for name, is_file, data in [("prompt", False, b"p"), *parts]:
        disposition = f'form-data; name="{name}"' + ('; filename="f"' if is_file else "")
        body += b"--%b\r\nContent-Disposition: %b\r\n\r\n%b\r\n" % (boundary.encode(), disposition.encode(), data)
    body += b"--%b--\r\n" % boundary.encode()
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    assert_answered(http.post(route, content=body[: len(body) - cut], headers=headers))


@given(
    route=ROUTES,
    content_type=st.sampled_from(
        ["application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=B", "", "x"]
    ),
    body=st.binary(max_size=200) | st.text(alphabet='{}[]":,&=%0a\\u', max_size=60).map(str.encode),
)
def test_any_bytes(http: httpx2.Client, route: str, content_type: str, body: bytes) -> None:
    assert_answered(http.post(route, content=body, headers={"content-type": content_type}))


def _saved(image_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((24, 16)).convert("RGBA" if image_format == "PNG" else "RGB").save(
        buffer, image_format
    )
    return buffer.getvalue()


PICTURES = st.sampled_from([_saved(name) for name in ("PNG", "WEBP", "JPEG", "GIF", "TIFF", "BMP")])

CHANGES = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6)


@given(original=PICTURES, changes=CHANGES, length=st.integers(0, 2000), mask=PICTURES)
def test_any_damaged_picture(
    http: httpx2.Client, original: bytes, changes: list[tuple[int, int]], length: int, mask: bytes
) -> None:
    data = bytearray(original)
    for position, value in changes:
        data[position % len(data)] = value
    upload = bytes(data[: length or None])
    assert_answered(http.post("/v1/videos", data={"prompt": "p"}, files={"input_reference": upload}))
    assert_answered(http.post("/v1/images/edits", data={"prompt": "p"}, files={"image": upload, "mask": mask}))
    assert_answered(http.post("/v1/images/edits", data={"prompt": "p"}, files={"image": mask, "mask": upload}))


HEADER_TEXT = st.text(alphabet=[chr(code) for code in range(0x20, 0x7F)], max_size=30).map(str.strip)

RANGES = HEADER_TEXT | st.builds(
    "bytes={}-{}".format, st.integers(-5, 10**30) | st.just(""), st.integers(-5, 10**30) | st.just("")
)


@given(data=st.data())
def test_any_header_on_a_download(http: httpx2.Client, data: st.DataObject) -> None:
    names = {"range": RANGES, "if-range": HEADER_TEXT, "if-none-match": HEADER_TEXT, "x-request-id": HEADER_TEXT}
    headers = {name: data.draw(values, name) for name, values in names.items() if data.draw(st.booleans())}
    answer = http.get(download(http), headers=headers)
    assert answer.status_code in (200, 206, 304, 416)
    assert len(answer.content) == int(answer.headers.get("content-length", 0))


@cache
def download(http: httpx2.Client) -> str:
    """The URL of a stored image."""
    answer = http.post(
        "/v1/images/edits", data={"prompt": "p", "response_format": "url"}, files={"image": _saved("PNG")}
    )
    return answer.json()["data"][0]["url"]


@given(key=HEADER_TEXT, authorization=HEADER_TEXT)
def test_any_header_on_a_creation(http: httpx2.Client, key: str, authorization: str) -> None:
    headers = {"idempotency-key": key, "authorization": authorization}
    assert_answered(http.post("/v1/videos", json={"prompt": "p"}, headers=headers))


@given(path=st.lists(st.text(max_size=12) | st.sampled_from(["v1", "videos", "images", "content", ".."]), max_size=6))
def test_any_path(http: httpx2.Client, base_url: str, path: list[str]) -> None:
    url = f"{base_url}/{'/'.join(quote(part, safe='') for part in path)}"
    for method in ("GET", "POST", "DELETE", "HEAD", "PUT", "OPTIONS"):
        answer = http.request(method, url)
        assert answer.status_code < 500
        if method != "HEAD":
            assert_answered(answer)
