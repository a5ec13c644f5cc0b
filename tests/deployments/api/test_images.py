"""`/v1/images`, as clients use it."""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import Any

import pytest

from tests.deployments.api.conftest import Server, opened, picture

FAST = {"num_inference_steps": 1}


def decoded(image: Any) -> bytes:
    return b64decode(image.b64_json, validate=True)


def test_a_prompt_alone_gives_a_png_of_the_models_default_size(images: Server) -> None:
    answer = images.openai().images.generate(prompt="a calico cat")
    image = opened(decoded(answer.data[0]))
    assert image.format == "PNG"
    assert answer.size == f"{image.width}x{image.height}"
    assert answer.model_extra["id"].startswith("img_")


@pytest.mark.parametrize(
    "size", [{"size": "48x32"}, {"size": "auto", "width": 48, "height": 32}, {"size": "16x32", "width": 48}]
)
def test_size_is_exact_and_width_and_height_override_it(images: Server, size: dict[str, Any]) -> None:
    answer = images.openai().images.generate(prompt="p", size=size.pop("size"), extra_body={**FAST, **size})
    assert opened(decoded(answer.data[0])).size == (48, 32)


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_output_format_is_the_format_of_the_bytes(images: Server, output_format: Any) -> None:
    answer = images.openai().images.generate(
        prompt="p", output_format=output_format, output_compression=50, extra_body=FAST
    )
    assert opened(decoded(answer.data[0])).format == output_format.upper()
    assert answer.output_format == output_format


def test_pictures_differ_from_call_to_call_and_the_told_seed_repeats_one(images: Server) -> None:
    client = images.openai()
    first, second = (client.images.generate(prompt="p", extra_body=FAST).data[0] for _ in range(2))
    again = client.images.generate(prompt="p", extra_body={**FAST, "seed": first.model_extra["seed"]}).data[0]
    assert decoded(first) != decoded(second)
    assert decoded(first) == decoded(again)


def test_n_pictures_have_consecutive_seeds_and_each_equals_its_seed_alone(images: Server) -> None:
    client = images.openai()
    several = client.images.generate(prompt="p", n=3, extra_body={**FAST, "seed": 5}).data
    assert [image.model_extra["seed"] for image in several] == [5, 6, 7]
    alone = client.images.generate(prompt="p", extra_body={**FAST, "seed": 6}).data[0]
    assert decoded(several[1]) == decoded(alone)


def test_a_list_of_seeds_gives_one_picture_each(images: Server) -> None:
    answer = images.openai().images.generate(prompt="p", extra_body={**FAST, "seed": [9, 3]})
    assert [image.model_extra["seed"] for image in answer.data] == [9, 3]


def test_null_means_the_default(images: Server) -> None:
    client = images.openai()
    answer = client.images.generate(prompt="p", model=None, n=None, size=None, quality=None, extra_body={"seed": None})
    assert len(answer.data) == 1


def test_what_other_models_understand_is_let_through(images: Server) -> None:
    answer = images.openai().images.generate(
        prompt="p",
        model="gpt-image-1",
        quality="hd",
        style="vivid",
        user="someone",
        background="auto",
        moderation="low",
        extra_body={**FAST, "enable_teacache": True},
    )
    assert decoded(answer.data[0])


def test_the_plain_answer_has_no_null(images: Server) -> None:
    answer = images.http.post("/v1/images/generations", json={"prompt": "p", **FAST}).json()
    assert None not in answer.values()
    assert None not in answer["data"][0].values()


def test_json_is_taken_as_json_whatever_its_content_type_says(images: Server) -> None:
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        answer = images.http.post(
            "/v1/images/generations", content=b'{"prompt": "p", "n": "2"}', headers={"content-type": kind}
        )
        assert len(answer.json()["data"]) == 2


@pytest.mark.parametrize("as_list", [False, True])
def test_an_edit_takes_one_file_and_a_list_of_files(images: Server, as_list: bool) -> None:
    image: Any = [picture(), picture((32, 32))] if as_list else picture()
    answer = images.openai().images.edit(image=image, prompt="p", extra_body=FAST)
    assert opened(decoded(answer.data[0])).format == "PNG"


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_an_input_image_is_judged_by_its_bytes(images: Server, image_format: str) -> None:
    files = {"image": ("../../etc/passwd.txt", picture(image_format=image_format), "text/html")}
    answer = images.http.post("/v1/images/edits", data={"prompt": "p", "num_inference_steps": "1"}, files=files)
    assert answer.status_code == 200


def test_an_edit_with_a_mask(images: Server) -> None:
    answer = images.openai().images.edit(
        image=picture(), mask=picture(mode="RGBA"), prompt="p", extra_body={**FAST, "strength": 0.5}
    )
    assert decoded(answer.data[0])


def test_an_edit_as_json_carries_its_images_as_data_urls(images: Server) -> None:
    url = f"data:image/png;base64,{b64encode(picture(mode='RGBA')).decode()}"
    body = {"prompt": "p", "images": [{"image_url": url}], "mask": {"image_url": url}, **FAST}
    assert images.http.post("/v1/images/edits", json=body).status_code == 200


def test_an_upload_without_a_length_is_read(images: Server) -> None:
    request = images.http.build_request("POST", "/v1/images/edits", data={"prompt": "p"}, files={"image": picture()})
    body = request.read()

    def chunks() -> Any:
        yield from (body[i : i + 100] for i in range(0, len(body), 100))

    headers = {"content-type": request.headers["content-type"]}
    assert images.http.post("/v1/images/edits", content=chunks(), headers=headers).status_code == 200


def test_an_edit_as_url_is_downloadable_until_asked_for_a_picture_it_has_not(images: Server) -> None:
    answer = images.openai().images.edit(image=picture(), prompt="p", n=2, response_format="url", extra_body=FAST)
    urls = [image.url for image in answer.data]
    assert urls[0].startswith("/v1/images/")
    files = [images.http.get(url) for url in urls]
    assert [file.headers["content-type"] for file in files] == ["image/png"] * 2
    assert files[0].content != files[1].content
    assert opened(files[0].content).format == "PNG"
    assert images.http.get(urls[0].replace("variant=0", "variant=2")).status_code == 404


def test_urls_are_absolute_with_a_public_url(public: Server) -> None:
    answer = public.openai().images.edit(image=picture(), prompt="p", response_format="url", extra_body=FAST)
    assert answer.data[0].url == f"https://pictures.example/base/v1/images/{answer.model_extra['id']}/content"


def test_parameters_reach_the_pixels(images: Server) -> None:
    client = images.openai()
    plain = client.images.generate(prompt="p", extra_body={**FAST, "seed": 1}).data[0]
    other = client.images.generate(
        prompt="p", extra_body={**FAST, "seed": 1, "negative_prompt": "blue", "true_cfg_scale": 3}
    ).data[0]
    assert decoded(plain) != decoded(other)
