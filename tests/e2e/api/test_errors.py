"""Bad input: each kind gets its status in OpenAI's envelope, with the parameter, and harms no later request."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from typing import Any

import httpx2
import pytest
from openai import BadRequestError

from tests.e2e.pictures import picture
from tests.e2e.server import SHORT, SMALL, Server

GENERATIONS, EDITS, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/videos"


def assert_envelope(answer: httpx2.Response, status: int, param: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error", "detail"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["detail"] == body["error"]["message"]
    assert body["error"]["param"] == param, body
    assert answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return body["error"]


def assert_serves(server: Server, route: str) -> None:
    if route == EDITS:
        answer = server.http.post(route, data=SMALL, files={"image": picture()})
    else:
        answer = server.http.post(route, json=SHORT if route == VIDEOS else SMALL)
    assert answer.status_code == 200, answer.text


COMMON: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ["p"]}, "prompt"),
    ({"prompt": "p" * 32_001}, "prompt"),
    ({"n": 0}, "n"),
    ({"n": 11}, "n"),
    ({"n": "many"}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": True}, "n"),
    ({"n": []}, "n"),
    ({"size": "big"}, "size"),
    ({"size": "0x64"}, "size"),
    ({"size": "-64x64"}, "size"),
    ({"size": "64x64x64"}, "size"),
    ({"size": "99999x99999"}, "size"),
    ({"size": 64}, "size"),
    ({"width": 0}, "width"),
    ({"width": 10**9}, "width"),
    ({"height": "tall"}, "height"),
    ({"height": 10**30}, "height"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"seed": []}, "seed"),
    ({"seed": [1, 2], "n": 3}, "seed"),
    ({"seed": list(range(11))}, "seed"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"num_inference_steps": 1001}, "num_inference_steps"),
    ({"guidance_scale": "high"}, "guidance_scale"),
    ({"guidance_scale": -1}, "guidance_scale"),
    ({"true_cfg_scale": "nan"}, "true_cfg_scale"),
    ({"true_cfg_scale": 3.0}, "true_cfg_scale"),
    ({"guidance_scale": "inf"}, "guidance_scale"),
    ({"guidance_scale_2": 3.0}, "guidance_scale_2"),
    ({"flow_shift": 0}, "flow_shift"),
    ({"strength": 1.5}, "strength"),
    ({"strength": 0.5}, "strength"),
    ({"negative_prompt": {}}, "negative_prompt"),
    ({"lora": 5}, "lora"),
    ({"lora": {"strength": 1}}, "lora"),
    ({"lora": {"nickname": "a", "strength": "x"}}, "lora"),
    ({"lora": '{"nickname": '}, "lora"),
    ({"lora": {"path": "~nobody-of-this-name/a.safetensors"}}, "lora"),
    ({"extra_body": '{"seed": '}, "extra_body"),
]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        *COMMON,
        ({"num_frames": 9}, "num_frames"),
        ({"response_format": "url"}, "response_format"),
        ({"response_format": "bmp"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 101}, "output_compression"),
        ({"stream": "perhaps"}, "stream"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"seed": 1, "n": 11, "stream": True}, "n"),
    ],
)
def test_a_wrong_field_of_a_picture(server: Server, body: dict[str, Any], param: str) -> None:
    answer = server.http.post(GENERATIONS, json={"prompt": "p", **body})
    assert assert_envelope(answer, 400, param)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        *COMMON,
        ({"prompt": ""}, "prompt"),
        ({"seconds": 0}, "seconds"),
        ({"seconds": "-4"}, "seconds"),
        ({"seconds": "long"}, "seconds"),
        ({"seconds": 10**6}, "seconds"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": 10**6}, "num_frames"),
        ({"fps": 0}, "fps"),
        ({"fps": 1000}, "fps"),
    ],
)
def test_a_wrong_field_of_a_video(server: Server, body: dict[str, Any], param: str) -> None:
    assert_envelope(server.http.post(VIDEOS, json={"prompt": "p", **body}), 400, param)


@pytest.mark.parametrize("route", [GENERATIONS, EDITS, VIDEOS])
def test_the_next_good_request_works(server: Server, route: str) -> None:
    server.http.post(route, json={"prompt": "p", "n": "bad"})
    server.http.post(route, content=b"{")
    assert_serves(server, route)


def test_openais_client_reads_the_envelope(server: Server) -> None:
    with pytest.raises(BadRequestError) as raised:
        server.openai().images.generate(prompt="p", n=11)
    assert raised.value.param == "n"
    assert raised.value.code == "invalid_value"
    assert raised.value.request_id


@pytest.mark.parametrize(
    "body",
    [b"{", b"[1]", b'"p"', b"nonsense", b"\xff\xfe", b"[" * 100_000, b'{"prompt": NaN}', b'{"prompt": "\\ud800"}'],
)
@pytest.mark.parametrize("route", [GENERATIONS, EDITS, "/v1/set_lora"])
def test_a_body_that_is_not_a_json_object(server: Server, route: str, body: bytes) -> None:
    assert_envelope(server.http.post(route, content=body, headers={"content-type": "application/json"}), 400)


def test_no_body_at_all_lacks_the_prompt(server: Server) -> None:
    assert_envelope(server.http.post(GENERATIONS), 400, "prompt")
    assert_envelope(server.http.post(VIDEOS), 400, "prompt")


def bomb() -> bytes:
    """A PNG of 30000 x 30000 pixels in a hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "upload",
    [b"", b"not an image", b"GIF89a" + bytes(100), picture()[:60], picture() * 0 + b"\x89PNG\r\n\x1a\n", bomb()],
    ids=["empty", "text", "gif", "truncated", "header", "bomb"],
)
def test_what_is_not_a_picture(server: Server, painter: Server, upload: bytes) -> None:
    answer = server.http.post(EDITS, data={"prompt": "p"}, files={"image": ("image.png", upload, "image/png")})
    assert_envelope(answer, 400, "image")
    answer = painter.http.post(EDITS, data={"prompt": "p"}, files={"image": picture(), "mask": upload})
    assert_envelope(answer, 400, "mask")
    answer = server.http.post(VIDEOS, data={"prompt": "p"}, files={"input_reference": upload})
    assert_envelope(answer, 400, "input_reference")
    assert_serves(server, EDITS)


@pytest.mark.parametrize(
    "reference",
    [
        "http://127.0.0.1/picture.png",
        "https://example.com/picture.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "data:image/png;base64,!!!",
        "data:image/png,%89PNG",
        "data:image/png;base64",
        "data:image/png;base64," + b64encode(b"no picture").decode(),
        {"image_url": "https://example.com/picture.png"},
        {"file_id": "file-1"},
        {},
    ],
)
def test_a_reference_to_what_lies_elsewhere(server: Server, reference: Any) -> None:
    assert_envelope(server.http.post(EDITS, json={"prompt": "p", "images": [reference]}), 400, "image")
    assert_envelope(
        server.http.post(VIDEOS, json={"prompt": "p", "input_reference": reference}), 400, "input_reference"
    )


def test_a_remote_url_is_refused_in_words(server: Server) -> None:
    answer = server.http.post(EDITS, json={"prompt": "p", "images": [{"image_url": "https://example.com/a.png"}]})
    assert "not fetched from remote URLs" in answer.json()["detail"]


@pytest.mark.parametrize("mask", [picture((32, 32), "RGBA"), picture()], ids=["other size", "no alpha"])
def test_a_mask_that_does_not_fit_its_image(painter: Server, mask: bytes) -> None:
    answer = painter.http.post(EDITS, data={"prompt": "p"}, files={"image": picture(), "mask": mask})
    assert_envelope(answer, 400, "mask")


def test_an_edit_without_an_image_and_one_with_too_many(server: Server) -> None:
    assert_envelope(server.http.post(EDITS, data={"prompt": "p"}), 400, "image")
    answer = server.http.post(EDITS, data={"prompt": "p"}, files=[("image[]", picture())] * 17)
    assert_envelope(answer, 400, "image")


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_beyond_50_mb(server: Server, chunked: bool) -> None:
    request = server.http.build_request(
        "POST", EDITS, data={"prompt": "p"}, files={"image": picture() + bytes(50 * 10**6)}
    )
    body = request.read()
    headers = {"content-type": request.headers["content-type"]}
    pieces: Any = (body[i : i + 2**20] for i in range(0, len(body), 2**20)) if chunked else body
    assert_envelope(server.http.post(EDITS, content=pieces, headers=headers), 413, "image")
    assert_serves(server, EDITS)


def test_a_json_body_beyond_its_limit(server: Server) -> None:
    body = {"prompt": "p", "padding": "x" * 2**21}
    assert_envelope(server.http.post(GENERATIONS, json=body), 413)
    assert_serves(server, GENERATIONS)


FORM = {"content-type": "multipart/form-data; boundary=B"}


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--B--\r\n"),
        ("multipart/form-data; boundary=B", b""),
        ("multipart/form-data; boundary=B", b"nonsense"),
        ("multipart/form-data; boundary=B", b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\np'),
        ("multipart/form-data; boundary=B", b"--B\r\nContent-Disposition: form-data\r\n\r\np\r\n--B--\r\n"),
        ("multipart/form-data; boundary=B", b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 300),
    ],
    ids=["no boundary", "empty", "nonsense", "cut short", "no name", "too many parts"],
)
def test_a_broken_multipart_body(server: Server, content_type: str, body: bytes) -> None:
    assert_envelope(server.http.post(VIDEOS, content=body, headers={"content-type": content_type}), 400)
    assert_serves(server, VIDEOS)


def test_form_names_that_contradict_each_other(server: Server) -> None:
    answer = server.http.post(VIDEOS, data={"prompt": "p", "lora": "a", "lora[nickname]": "b"})
    assert_envelope(answer, 400, "lora")
    assert_envelope(server.http.post(VIDEOS, data={"prompt": "p", "lora" + "[]" * 9: "a"}), 400, "lora" + "[]" * 9)


def test_text_that_is_not_utf_8(server: Server) -> None:
    body = b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\r\n--B--\r\n'
    assert_envelope(server.http.post(VIDEOS, content=body, headers=FORM), 400, "prompt")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/videos/nothing"),
        ("DELETE", "/v1/videos/nothing"),
        ("GET", "/v1/videos/nothing/content"),
        ("GET", "/v1/videos/..%2F..%2Fetc%2Fpasswd"),
        ("GET", "/v1/images/nothing/content"),
        ("GET", "/v2/anything"),
        ("POST", "/v1/images/variations"),
        ("POST", "/v1/videos/nothing/remix"),
        ("POST", "/v1/videos/edits"),
        ("POST", "/v1/videos/extensions"),
        ("POST", "/v1/videos/characters"),
        ("GET", "/v1/videos/characters/one"),
    ],
)
def test_what_does_not_exist(server: Server, method: str, path: str) -> None:
    error = assert_envelope(server.http.request(method, path), 404)
    assert error["type"] == "not_found_error"
    assert error["code"]


def test_a_page_after_a_video_that_does_not_exist(server: Server) -> None:
    assert_envelope(server.http.get("/v1/videos?after=nothing"), 404, "after")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", GENERATIONS, "POST"),
        ("PUT", VIDEOS, "GET, POST"),
        ("PATCH", "/v1/videos/a", "DELETE, GET"),
        ("PUT", "/v1/videos/a/content", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_the_right_one(server: Server, method: str, path: str, allowed: str) -> None:
    answer = server.http.request(method, path)
    assert_envelope(answer, 405)
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/videos?limit=0", "limit"),
        ("/v1/videos?limit=101", "limit"),
        ("/v1/videos?limit=few", "limit"),
        ("/v1/videos?order=random", "order"),
        ("/v1/videos/any/content?variant=poster", "variant"),
        ("/v1/videos/any/content?variant=-1", "variant"),
        ("/v1/videos/any/content?index=-1", "index"),
        ("/v1/images/any/content?variant=first", "variant"),
    ],
)
def test_a_wrong_query(server: Server, path: str, param: str) -> None:
    assert_envelope(server.http.get(path), 400, param)


def test_every_answer_has_a_request_id_and_one_of_the_clients_is_kept(server: Server) -> None:
    first, second = (server.http.get("/health").headers["x-request-id"] for _ in range(2))
    assert first != second
    kept = server.http.get("/nowhere", headers={"x-request-id": "mine-1"})
    assert kept.headers["x-request-id"] == "mine-1"
