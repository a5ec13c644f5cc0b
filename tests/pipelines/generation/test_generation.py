"""A generation is an iterator over steps, and a job alone decides its pixels."""

from __future__ import annotations

import gc
import io
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import av
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline
from PIL import Image

from configs.model_family import families
from pipelines.generation.generation import generate
from pipelines.job import Event, InvalidJob, Job, Preview, Progress, Result, Task, content_key
from pipelines.model.load import Model
from tests import tiny_models
from tests.pipelines.conftest import HEIGHT, WIDTH, make_job, mask, picture, png

Load = Callable[[str], Model]

TASKS = [
    (name, Task(task))
    for name in tiny_models.FAMILIES
    for task in next(family for family in families() if family.name == name).tasks
]


def events(model: Model, task: Task, **changes: Any) -> list[Event]:
    return list(generate(model, *make_job(model, task, **changes)))


def outputs(model: Model, task: Task, **changes: Any) -> list[bytes]:
    result = events(model, task, **changes)[-1]
    assert isinstance(result, Result)
    return [output.data for output in result.outputs]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)), np.int16)


@pytest.fixture
def wan(tiny_model: Load) -> Model:
    return tiny_model("wan2.1-t2v")


@pytest.fixture
def z_image(tiny_model: Load) -> Model:
    return tiny_model("z-image")


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_every_family_does_each_of_its_tasks_in_the_size_asked_for(tiny_model: Load, name: str, task: Task) -> None:
    model = tiny_model(name)
    given = events(model, task, num_inference_steps=3)
    *steps, result = given
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    assert all(step.total == len(steps) for step in steps)
    assert 1 <= len(steps) <= 3
    assert result.seconds.keys() == {"encode", "denoise", "decode", "media"}
    assert result.seconds["denoise"] > 0
    [output] = result.outputs
    if not task.is_video:
        assert pixels(output.data).shape == (HEIGHT, WIDTH, 3)
        assert pixels(output.data).std() > 5
        return
    with av.open(io.BytesIO(output.data)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.frames, stream.average_rate) == (WIDTH, HEIGHT, 6, 16)
    assert Image.open(io.BytesIO(output.thumbnail)).size == (WIDTH, HEIGHT)
    assert Image.open(io.BytesIO(output.spritesheet)).format == "JPEG"


@pytest.mark.parametrize("task", [Task.TEXT_TO_IMAGE, Task.IMAGE_EDIT, Task.INPAINT])
def test_a_model_of_no_known_family_does_what_its_pipelines_declare(tiny_model: Load, task: Task) -> None:
    model = tiny_model(tiny_models.UNKNOWN_FAMILY)
    assert pixels(outputs(model, task)[0]).shape == (HEIGHT, WIDTH, 3)


def test_equal_jobs_give_equal_pixels_and_seeds_differ(z_image: Model) -> None:
    first, again, other = (outputs(z_image, Task.TEXT_TO_IMAGE, seeds=(seed,)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", ["wan2.1-t2v", "flux1", "z-image", "sd3"])
def test_an_output_depends_on_its_own_seed_alone(tiny_model: Load, name: str) -> None:
    model = tiny_model(name)
    together = outputs(model, Task.TEXT_TO_IMAGE, seeds=(3, 1, 2))
    assert together == [outputs(model, Task.TEXT_TO_IMAGE, seeds=(seed,))[0] for seed in (3, 1, 2)]


def test_progress_counts_over_all_outputs(z_image: Model) -> None:
    steps = [e for e in events(z_image, Task.TEXT_TO_IMAGE, seeds=(1, 2, 3)) if isinstance(e, Progress)]
    assert steps == [Progress(step, 6) for step in range(1, 7)]


def test_prompts_are_encoded_once_per_job(z_image: Model) -> None:
    encoder = type(z_image.pipeline.text_encoder)
    for prompt, changes in (("one", {"seeds": (1,), "partial_images": 1}), ("three", {"seeds": (1, 2, 3)})):
        with mock.patch.object(encoder, "forward", autospec=True, side_effect=encoder.forward) as forward:
            events(z_image, Task.TEXT_TO_IMAGE, prompt=prompt, negative_prompt=f"{prompt} not", **changes)
        assert forward.call_count == 2, "a prompt and a negative prompt"


def test_interleaved_generations_give_the_pixels_each_gives_alone(tiny_model: Load) -> None:
    wan, flux = tiny_model("wan2.1-t2v"), tiny_model("flux1")
    jobs = [
        (wan, Task.TEXT_TO_IMAGE, {"seeds": (1, 2), "num_inference_steps": 3}),
        (wan, Task.TEXT_TO_VIDEO, {"prompt": "a dog", "num_inference_steps": 5}),
        (wan, Task.IMAGE_EDIT, {"num_inference_steps": 4, "partial_images": 2}),
        (flux, Task.TEXT_TO_IMAGE, {"partial_images": 1}),
        (flux, Task.INPAINT, {"num_inference_steps": 4}),
    ]
    alone = [events(model, task, **changes) for model, task, changes in jobs]
    running = [generate(model, *make_job(model, task, **changes)) for model, task, changes in jobs]
    together: list[list[Event]] = [[] for _ in jobs]
    for round_of_events in itertools.zip_longest(*running):
        for given, event in zip(together, round_of_events, strict=True):
            if event is not None:
                given.append(event)
    for given, expected in zip(together, alone, strict=True):
        assert given[:-1] == expected[:-1]
        assert given[-1].outputs == expected[-1].outputs


def test_gradients_stay_as_the_caller_has_them(z_image: Model) -> None:
    job = make_job(z_image, Task.TEXT_TO_IMAGE)
    assert torch.is_grad_enabled()
    for _ in generate(z_image, *job):
        assert torch.is_grad_enabled()
    with torch.no_grad():
        for _ in generate(z_image, *job):
            assert not torch.is_grad_enabled()


@pytest.mark.parametrize("steps_done", [0, 1, 3])
def test_a_closed_generation_leaves_the_model_as_it_was(z_image: Model, steps_done: int) -> None:
    task, changes = Task.TEXT_TO_IMAGE, {"num_inference_steps": 4}
    before = outputs(z_image, task, **changes)
    generation = generate(z_image, *make_job(z_image, task, seeds=(9,), **changes))
    for _ in range(steps_done):
        next(generation)
    with mock.patch.object(type(z_image.pipeline.transformer), "forward", side_effect=AssertionError("one more step")):
        generation.close()
    with pytest.raises(StopIteration):
        next(generation)
    assert outputs(z_image, task, **changes) == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_generation_leaves_nothing_for_the_cycle_collector(z_image: Model, finished: bool) -> None:
    """Latents and embeddings are freed by the end of the job, not whenever the collector runs."""
    views: list[weakref.ref[Any]] = []
    make_view = Model.unshared_pipeline_for

    def watched(model: Model, task: Task) -> Any:
        view = make_view(model, task)
        views.extend([weakref.ref(view), weakref.ref(view.scheduler)])
        return view

    gc.collect()
    gc.disable()
    try:
        with mock.patch.object(Model, "unshared_pipeline_for", watched):
            generation: Iterator[Event] = generate(z_image, *make_job(z_image, Task.TEXT_TO_IMAGE, partial_images=1))
            next(generation)
            if finished:
                list(generation)
            generation.close()
        del generation
        assert views
        assert [view() for view in views] == [None] * len(views)
    finally:
        gc.enable()


def test_previews_are_spaced_evenly_and_approach_the_picture(tiny_model: Load) -> None:
    model = tiny_model("flux1")
    given = events(
        model, Task.TEXT_TO_IMAGE, num_inference_steps=8, partial_images=3, output_format="webp", seeds=(1, 2)
    )
    kinds = [type(event) for event in given]
    assert [kinds[:i].count(Progress) + 1 for i, kind in enumerate(kinds) if kind is Preview] == [2, 4, 6]
    previews = [event for event in given if isinstance(event, Preview)]
    assert [preview.index for preview in previews] == [0, 1, 2]
    final = pixels(given[-1].outputs[0].data)
    distances = [np.abs(pixels(preview.data) - final).mean() for preview in previews]
    assert all(Image.open(io.BytesIO(preview.data)).format == "WEBP" for preview in previews)
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize("name", ["wan2.1-t2v", "flux1", "sd3", "z-image", "flux2", "qwen-image"])
def test_the_last_preview_resembles_the_picture(tiny_model: Load, name: str) -> None:
    model = tiny_model(name)
    given = events(model, Task.TEXT_TO_IMAGE, num_inference_steps=8, partial_images=3)
    preview, result = [event for event in given if isinstance(event, Preview)][-1], given[-1]
    near, far = pixels(preview.data), pixels(outputs(model, Task.TEXT_TO_IMAGE, seeds=(2,))[0])
    final = pixels(result.outputs[0].data)
    assert np.corrcoef(near.ravel(), final.ravel())[0, 1] > 0.7 > np.corrcoef(far.ravel(), final.ravel())[0, 1]


def test_previews_change_no_pixel(z_image: Model) -> None:
    plain, previewed = (outputs(z_image, Task.TEXT_TO_IMAGE, num_inference_steps=4, partial_images=n) for n in (0, 3))
    assert plain == previewed


@pytest.mark.parametrize(
    ("size", "num_frames"), [((64, 48), 5), ((33, 17), 4), ((16, 16), 1), ((50, 34), 8)], ids=lambda v: str(v)
)
def test_any_size_is_honoured_exactly(wan: Model, size: tuple[int, int], num_frames: int) -> None:
    width, height = size
    [clip] = outputs(wan, Task.TEXT_TO_VIDEO, width=width, height=height, num_frames=num_frames)
    with av.open(io.BytesIO(clip)) as container:
        stream = container.streams.video[0]
        assert stream.frames == num_frames
        assert (stream.width, stream.height) == (width + width % 2, height + height % 2)
    [image] = outputs(wan, Task.TEXT_TO_IMAGE, width=width, height=height)
    assert pixels(image).shape == (height, width, 3)


def test_a_smaller_size_is_the_top_left_of_what_is_computed(wan: Model) -> None:
    [whole] = outputs(wan, Task.TEXT_TO_IMAGE, width=64, height=64)
    [part] = outputs(wan, Task.TEXT_TO_IMAGE, width=50, height=61)
    np.testing.assert_array_equal(pixels(part), pixels(whole)[:61, :50])


@pytest.mark.parametrize("size", [(96, 48), (32, 128), (16, 16)], ids=str)
def test_inpainting_of_an_area_of_its_own_gives_the_whole_picture_in_the_asked_size(
    tiny_model: Load, size: tuple[int, int]
) -> None:
    """Qwen-Image-Edit inpaints a megapixel (here 64x64 pixels) of the requested shape: the same image at any scale."""
    model, (width, height) = tiny_model("qwen-image-edit"), size
    preview, *_, result = events(model, Task.INPAINT, width=width, height=height, partial_images=1)
    [large] = outputs(model, Task.INPAINT, width=4 * width, height=4 * height)
    shrunk = np.asarray(Image.open(io.BytesIO(large)).resize(size, Image.Resampling.BICUBIC), np.int16)
    small = pixels(result.outputs[0].data)
    assert small.shape == pixels(preview.data).shape == (height, width, 3)
    assert np.abs(small - shrunk).mean() < small.std() / 4


def test_inpainting_of_a_megapixel_at_most_gives_the_asked_size_beyond_it(tiny_model: Load) -> None:
    """FLUX.2 klein by itself would return 1184x880 of 1200x900; here 64x48 of 80x60."""
    with tiny_models.small_megapixel(Flux2KleinInpaintPipeline):
        [picture] = outputs(
            tiny_model("flux2-klein"), Task.INPAINT, width=80, height=60, num_inference_steps=1, strength=1.0
        )
    assert pixels(picture).shape == (60, 80, 3)


@pytest.mark.parametrize(("output_format", "pillow_format"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
def test_pictures_come_in_the_format_asked_for(z_image: Model, output_format: str, pillow_format: str) -> None:
    [data] = outputs(z_image, Task.TEXT_TO_IMAGE, output_format=output_format, output_compression=80)
    assert Image.open(io.BytesIO(data)).format == pillow_format


@pytest.mark.parametrize("name", ["wan2.1-t2v", "z-image", "sd3"])
def test_flow_shift_changes_one_job_only(tiny_model: Load, name: str) -> None:
    model = tiny_model(name)
    plain = outputs(model, Task.TEXT_TO_IMAGE, num_inference_steps=3)
    assert outputs(model, Task.TEXT_TO_IMAGE, num_inference_steps=3, flow_shift=9.0) != plain
    assert outputs(model, Task.TEXT_TO_IMAGE, num_inference_steps=3) == plain


def test_an_edit_strays_from_its_source_with_strength(wan: Model) -> None:
    def spread(strength: float) -> float:
        [one], [other] = (
            outputs(wan, Task.IMAGE_EDIT, strength=strength, num_inference_steps=10, seeds=(seed,)) for seed in (1, 2)
        )
        return float(np.abs(pixels(one) - pixels(other)).mean())

    assert spread(0.1) < spread(0.5) < spread(1.0)


def outputs_of(model: Model, task: Task, media: dict[str, bytes], **changes: Any) -> list[bytes]:
    job, _ = make_job(model, task, **changes)
    *_, result = generate(model, job, media)
    return [output.data for output in result.outputs]


def test_several_references_reach_a_pipeline_that_takes_several(tiny_model: Load) -> None:
    model = tiny_model("flux2")
    references = [picture("crimson"), picture("navy")]
    media = {content_key(data): data for data in references}
    one = outputs_of(model, Task.IMAGE_EDIT, media, images=tuple(media)[:1])
    assert outputs_of(model, Task.IMAGE_EDIT, media, images=tuple(media)) != one


def test_what_is_transparent_in_an_input_is_white(wan: Model) -> None:
    transparent, white = png(Image.new("RGBA", (60, 50), (255, 0, 0, 0))), png(Image.new("RGB", (60, 50), "white"))
    first, second = (
        outputs_of(wan, Task.IMAGE_EDIT, {content_key(data): data}, images=(content_key(data),))
        for data in (transparent, white)
    )
    assert first == second


class TestRefusals:
    """Bad input is the client's error, found before the first step, and the next good job works."""

    def refused(self, model: Model, task: Task, media: dict[str, bytes] | None = None, **changes: Any) -> InvalidJob:
        job, needed = make_job(model, task, **changes)
        with pytest.raises(InvalidJob) as refusal:
            next(generate(model, job, media or needed))
        assert outputs(model, Task.TEXT_TO_IMAGE)
        return refusal.value

    def test_an_input_that_is_no_picture(self, z_image: Model) -> None:
        data = b"not a picture"
        refusal = self.refused(z_image, Task.IMAGE_EDIT, {content_key(data): data}, images=(content_key(data),))
        assert refusal.param == "image"

    def test_a_mask_of_another_size(self, z_image: Model) -> None:
        small = png(Image.new("RGBA", (8, 8)))
        media = {content_key(small): small, content_key(picture()): picture()}
        assert self.refused(z_image, Task.INPAINT, media, mask=content_key(small)).param == "mask"

    def test_a_strength_that_leaves_no_step(self, z_image: Model) -> None:
        refusal = self.refused(z_image, Task.IMAGE_EDIT, strength=0.1, num_inference_steps=4)
        assert refusal.param == "strength"

    def test_what_the_pipeline_itself_refuses(self, wan: Model) -> None:
        refusal = self.refused(wan, Task.TEXT_TO_IMAGE, guidance_scale_2=3.0)
        assert "boundary_ratio" in str(refusal)

    def test_a_task_the_model_cannot_do(self, wan: Model) -> None:
        job = Job(**{**make_job(wan, Task.TEXT_TO_IMAGE)[0].model_dump(), "task": Task.INPAINT})
        with pytest.raises(InvalidJob, match="text_to_video"):
            next(generate(wan, job, {content_key(mask()): mask()}))


def test_a_failure_inside_the_pipeline_is_raised_as_it_is(z_image: Model) -> None:
    generation = generate(z_image, *make_job(z_image, Task.TEXT_TO_IMAGE))
    next(generation)
    broken = mock.patch.object(type(z_image.pipeline.transformer), "forward", side_effect=RuntimeError("CUDA error"))
    with broken, pytest.raises(RuntimeError, match="CUDA error"):
        next(generation)
    assert outputs(z_image, Task.TEXT_TO_IMAGE)
