"""A job as the arguments of each pipeline: what the call's signature decides, and where images go."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image

from configs.model_family import Match, ModelFamily, SamplingDefaults, families
from pipelines.generation.arguments import call_arguments
from pipelines.job import InvalidJob, Job, Task
from pipelines.media.canvas import Canvas

FAMILY = ModelFamily(
    name="any",
    match=Match(pipelines=()),
    tasks={},
    parameters=frozenset(),
    defaults=SamplingDefaults(width=64, height=64, num_inference_steps=4),
    size_multiple=16,
    frame_multiple=4,
)


def make_job(task: Task, **changes: Any) -> Job:
    values = {"id": "job", "task": task, "prompt": "a cat", "width": 60, "height": 50, "num_inference_steps": 4}
    return Job(**{**values, "seeds": (1,), "guidance_scale": 4.0, "strength": 0.5, **changes})


def arguments(class_name: str, job: Job, images: int = 0, mask: Image.Image | None = None) -> dict[str, Any]:
    pictures = [Image.new("RGB", (120, 100), color) for color in ("red", "blue", "lime")[:images]]
    return call_arguments(getattr(diffusers, class_name), FAMILY, job, pictures, mask)


@pytest.mark.parametrize(
    ("asked", "computed"),
    [((64, 48, 5), (64, 48, 5)), ((60, 50, 6), (64, 64, 9)), ((1, 1, 1), (16, 16, 1)), ((65, 16, 4), (80, 16, 5))],
)
def test_the_next_size_that_the_model_can_is_computed(asked: tuple[int, ...], computed: tuple[int, ...]) -> None:
    width, height, num_frames = asked
    job = make_job(Task.TEXT_TO_VIDEO, width=width, height=height, num_frames=num_frames)
    assert Canvas.for_job(job, FAMILY) == Canvas(*computed)


def test_a_pipeline_is_given_what_it_accepts_and_nothing_it_has_no_value_for() -> None:
    given = arguments("WanPipeline", make_job(Task.TEXT_TO_VIDEO, num_frames=6, guidance_scale_2=2.0))
    assert given == {
        "prompt": "a cat",
        "width": 64,
        "height": 64,
        "num_frames": 9,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "guidance_scale_2": 2.0,
    }
    assert arguments("QwenImagePipeline", make_job(Task.TEXT_TO_IMAGE, true_cfg_scale=3.0))["true_cfg_scale"] == 3.0


def test_a_family_that_knows_shorter_prompts_than_its_pipeline_has_them() -> None:
    (schnell,) = (family for family in families() if family.name == "flux1-schnell")
    given = call_arguments(diffusers.FluxPipeline, schnell, make_job(Task.TEXT_TO_IMAGE), [], None)
    assert given["max_sequence_length"] == 256
    assert "max_sequence_length" not in arguments("FluxPipeline", make_job(Task.TEXT_TO_IMAGE))


def test_kontext_keeps_the_asked_size() -> None:
    assert arguments("FluxKontextPipeline", make_job(Task.TEXT_TO_IMAGE))["max_area"] == 64 * 64


def test_a_source_fills_the_asked_size_and_its_edges_are_repeated_beyond() -> None:
    source = Image.new("RGB", (120, 100), "red")
    source.paste("blue", (0, 99, 120, 100))
    given = call_arguments(diffusers.FluxImg2ImgPipeline, FAMILY, make_job(Task.IMAGE_EDIT), [source], None)
    pixels = np.asarray(given["image"])
    assert pixels.shape == (64, 64, 3)
    np.testing.assert_array_equal(pixels[50:], np.broadcast_to(pixels[49], (14, 64, 3)))
    np.testing.assert_array_equal(pixels[:, 60:], pixels[:, 59:60].repeat(4, axis=1))
    assert given["strength"] == 0.5


def test_a_source_of_another_shape_is_cropped_not_squeezed() -> None:
    source = Image.new("RGB", (300, 50), "white")
    source.paste("black", (120, 0, 180, 50))
    given = call_arguments(diffusers.FluxImg2ImgPipeline, FAMILY, make_job(Task.IMAGE_EDIT), [source], None)
    assert np.asarray(given["image"]).max() == 0, "the middle 60 columns"


def test_a_picture_is_a_clip_of_one_frame_to_a_video_pipeline() -> None:
    [frame] = arguments("WanVideoToVideoPipeline", make_job(Task.IMAGE_EDIT), images=1)["video"]
    assert frame.size == (64, 64)


def test_a_clip_starts_with_the_first_image_and_may_end_with_the_second() -> None:
    job = make_job(Task.IMAGE_TO_VIDEO, num_frames=5)
    one, two = (arguments("WanImageToVideoPipeline", job, images=count) for count in (1, 2))
    assert one["image"].getpixel((0, 0)) == (255, 0, 0)
    assert "last_image" not in one
    assert two["last_image"].getpixel((0, 0)) == (0, 0, 255)


def test_references_are_given_as_they_are() -> None:
    one, three = (arguments("Flux2Pipeline", make_job(Task.IMAGE_EDIT), images=count)["image"] for count in (1, 3))
    assert one.size == (120, 100)
    assert [image.getpixel((0, 0)) for image in three] == [(255, 0, 0), (0, 0, 255), (0, 255, 0)]


def test_a_mask_lies_on_its_source() -> None:
    mask = Image.new("L", (120, 100), 0)
    mask.paste(255, (0, 0, 60, 100))
    given = arguments("Flux2KleinInpaintPipeline", make_job(Task.INPAINT), images=2, mask=mask)
    pixels = np.asarray(given["mask_image"])
    assert pixels.shape == (64, 64)
    assert pixels[:, :26].min() == 255
    assert pixels[:, 34:].max() == 0
    assert given["image"].getpixel((0, 0)) == (255, 0, 0)
    assert [image.getpixel((0, 0)) for image in given["image_reference"]] == [(0, 0, 255)]


def test_a_strength_that_leaves_no_step_is_refused() -> None:
    with pytest.raises(InvalidJob, match=r"strength 0\.2 of 4 steps") as refusal:
        arguments("FluxImg2ImgPipeline", make_job(Task.IMAGE_EDIT, strength=0.2), images=1)
    assert refusal.value.param == "strength"
    assert "strength" not in arguments("FluxPipeline", make_job(Task.TEXT_TO_IMAGE, strength=0.2))
