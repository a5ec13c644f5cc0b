"""`/v1/images`, as clients use it."""

from __future__ import annotations

import io
import json
from base64 import b64decode, b64encode
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.e2e.pictures import opened, picture, pixels
from tests.e2e.server import SMALL, Server

FAST = {"num_inference_steps": 2}
FORM = {name: str(value) for name, value in SMALL.items()}


def small(**fields: Any) -> dict[str, Any]:
    """Arguments of OpenAI's client for a small image; `fields` go into `extra_body`."""
    return {"prompt": "p", "size": "64x64", "extra_body": {**FAST, **fields}}


def decoded(image: Any) -> bytes:
    return b64decode(image.b64_json, validate=True)


def test_a_prompt_alone_gives_a_png_of_the_models_default_size(server: Server) -> None:
    answer = server.openai().images.generate(prompt="a calico cat", extra_body=FAST)
    image = opened(decoded(answer.data[0]))
    assert image.format == "PNG"
    assert answer.size == f"{image.width}x{image.height}"
    assert answer.model_extra["id"].startswith("img_")


@pytest.mark.parametrize(
    "size", [{"size": "48x32"}, {"size": "auto", "width": 48, "height": 32}, {"size": "16x32", "width": 48}]
)
def test_size_is_exact_and_width_and_height_override_it(server: Server, size: dict[str, Any]) -> None:
    answer = server.openai().images.generate(prompt="p", size=size.pop("size"), extra_body={**FAST, **size})
    assert opened(decoded(answer.data[0])).size == (48, 32)


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_output_format_is_the_format_of_the_bytes(server: Server, output_format: Any) -> None:
    answer = server.openai().images.generate(**small(), output_format=output_format, output_compression=50)
    assert opened(decoded(answer.data[0])).format == output_format.upper()
    assert answer.output_format == output_format


def test_pictures_differ_from_call_to_call_and_the_told_seed_repeats_one(server: Server) -> None:
    client = server.openai()
    first, second = (client.images.generate(**small()).data[0] for _ in range(2))
    again = client.images.generate(**small(seed=first.model_extra["seed"])).data[0]
    assert decoded(first) != decoded(second)
    assert decoded(first) == decoded(again)


def test_n_pictures_have_consecutive_seeds_and_each_equals_its_seed_alone(server: Server) -> None:
    client = server.openai()
    several = client.images.generate(**small(seed=5), n=3).data
    assert [image.model_extra["seed"] for image in several] == [5, 6, 7]
    alone = client.images.generate(**small(seed=6)).data[0]
    assert decoded(several[1]) == decoded(alone)


def test_a_list_of_seeds_gives_one_picture_each(server: Server) -> None:
    answer = server.openai().images.generate(**small(seed=[9, 3]))
    assert [image.model_extra["seed"] for image in answer.data] == [9, 3]


def test_null_means_the_default(server: Server) -> None:
    client = server.openai()
    answer = client.images.generate(prompt="p", model=None, n=None, size=None, quality=None, extra_body={"seed": None})
    assert len(answer.data) == 1


def test_what_other_models_understand_is_let_through(server: Server) -> None:
    answer = server.openai().images.generate(
        **small(enable_teacache=True),
        model="gpt-image-1",
        quality="hd",
        style="vivid",
        user="someone",
        background="auto",
        moderation="low",
    )
    assert decoded(answer.data[0])


def test_the_plain_answer_has_no_null(server: Server) -> None:
    answer = server.http.post("/v1/images/generations", json=SMALL).json()
    assert None not in answer.values()
    assert None not in answer["data"][0].values()


def test_json_is_taken_as_json_whatever_its_content_type_says(server: Server) -> None:
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        answer = server.http.post(
            "/v1/images/generations", content=json.dumps({**SMALL, "n": "2"}), headers={"content-type": kind}
        )
        assert len(answer.json()["data"]) == 2


@pytest.mark.parametrize("as_list", [False, True])
def test_an_edit_takes_a_file_and_a_list_of_one_file(server: Server, as_list: bool) -> None:
    answer = server.openai().images.edit(**small(), image=[picture()] if as_list else picture())
    assert opened(decoded(answer.data[0])).format == "PNG"


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_an_input_image_is_judged_by_its_bytes(server: Server, image_format: str) -> None:
    files = {"image": ("../../etc/passwd.txt", picture(image_format=image_format), "text/html")}
    answer = server.http.post("/v1/images/edits", data=FORM, files=files)
    assert answer.status_code == 200


def test_a_mask_says_what_may_change(painter: Server) -> None:
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    answer = painter.openai().images.edit(**small(num_inference_steps=2), image=picture(), mask=buffer.getvalue())
    error = np.abs(pixels(decoded(answer.data[0])) - pixels(picture()))
    assert error[:, :24].mean() < error[:, 40:].mean()


def test_an_edit_as_json_carries_its_images_as_data_urls(painter: Server) -> None:
    url = f"data:image/png;base64,{b64encode(picture(mode='RGBA')).decode()}"
    body = {**SMALL, "images": [{"image_url": url}], "mask": {"image_url": url}}
    assert painter.http.post("/v1/images/edits", json=body).status_code == 200


def test_an_upload_without_a_length_is_read(server: Server) -> None:
    request = server.http.build_request("POST", "/v1/images/edits", data=FORM, files={"image": picture()})
    body = request.read()

    def chunks() -> Any:
        yield from (body[i : i + 100] for i in range(0, len(body), 100))

    headers = {"content-type": request.headers["content-type"]}
    assert server.http.post("/v1/images/edits", content=chunks(), headers=headers).status_code == 200


def test_an_edit_as_url_is_downloadable_until_asked_for_a_picture_it_has_not(server: Server) -> None:
    answer = server.openai().images.edit(**small(), image=picture(), n=2, response_format="url")
    urls = [image.url for image in answer.data]
    assert urls[0].startswith("/v1/images/")
    files = [server.http.get(url) for url in urls]
    assert [file.headers["content-type"] for file in files] == ["image/png"] * 2
    assert files[0].content != files[1].content
    assert opened(files[0].content).format == "PNG"
    assert server.http.get(urls[0].replace("variant=0", "variant=2")).status_code == 404


def test_urls_are_absolute_with_a_public_url(painter: Server) -> None:
    answer = painter.openai().images.edit(**small(), image=picture(), response_format="url")
    assert answer.data[0].url == f"https://pictures.example/base/v1/images/{answer.model_extra['id']}/content"


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("server", {"negative_prompt": "blue"}),
        ("server", {"guidance_scale": 2}),
        ("server", {"flow_shift": 2}),
        ("server", {"prompt": "q"}),
        ("painter", {"guidance_scale": 2}),
        ("painter", {"negative_prompt": "blue", "true_cfg_scale": 3}),
    ],
)
def test_parameters_reach_the_pixels(request: pytest.FixtureRequest, kind: str, changed: dict[str, Any]) -> None:
    painting: Server = request.getfixturevalue(kind)
    assert painting.picture(seed=1) == painting.picture(seed=1)
    assert painting.picture(seed=1) != painting.picture(seed=1, **changed)


def test_strength_is_how_far_an_edit_leaves_its_picture(server: Server) -> None:
    client = server.openai()
    near, far = (
        client.images.edit(**small(num_inference_steps=5, strength=strength, seed=1), image=picture()).data[0]
        for strength in (0.2, 1.0)
    )
    assert decoded(near) != decoded(far)
