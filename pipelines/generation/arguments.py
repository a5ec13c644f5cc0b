"""A job as the arguments of a diffusers pipeline: the one place that knows how pipelines name them.

The arguments a pipeline accepts are read from the signature of its `__call__`; nothing here depends on a model's name.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from configs.model_family import ModelFamily
from pipelines.job import InvalidJob, Job, Task
from pipelines.media.canvas import Canvas


def call_arguments(
    pipeline_class: type, family: ModelFamily, job: Job, images: Sequence[Image.Image], mask: Image.Image | None
) -> dict[str, Any]:
    """The keyword arguments of `pipeline_class.__call__` for this job, except its generator and output type.

    Args:
        images: the job's input images.
        mask: white where the first image is to be edited.

    Raises:
        InvalidJob: the strength leaves no denoising step to do.
    """
    accepted = inspect.signature(pipeline_class.__call__).parameters
    canvas = Canvas.for_job(job, family)
    values = {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "width": canvas.width,
        "height": canvas.height,
        "num_frames": canvas.num_frames,
        "frame_rate": job.fps,
        "num_inference_steps": job.num_inference_steps,
        "guidance_scale": job.guidance_scale,
        "guidance_scale_2": job.guidance_scale_2,
        "true_cfg_scale": job.true_cfg_scale,
        "strength": job.strength,
        "max_sequence_length": family.max_sequence_length,
        # Kontext scales the requested size to this area, by default about a megapixel.
        "max_area": canvas.width * canvas.height,
    }
    if "strength" in accepted and job.strength is not None and job.strength * job.num_inference_steps < 1:
        raise InvalidJob(
            f"strength {job.strength:g} of {job.num_inference_steps} steps leaves none to do: raise one of them",
            "strength",
        )
    if images:
        # The output starts from a source, pixel for pixel; a reference is only looked at, at its own size.
        is_source = job.task is Task.IMAGE_TO_VIDEO or "strength" in accepted or "mask_image" in accepted
        values |= _source_arguments(job, canvas, images, mask) if is_source else _reference_arguments(images)
    return {name: value for name, value in values.items() if name in accepted and value is not None}


def _source_arguments(
    job: Job, canvas: Canvas, images: Sequence[Image.Image], mask: Image.Image | None
) -> dict[str, Any]:
    first, *others = [_on_canvas(opaque(image), job, canvas) for image in images]
    return {
        "image": first,
        # To a video-to-video pipeline, an image is a video of one frame.
        "video": [first],
        "last_image": others[0] if others else None,
        "image_reference": others or None,
        "mask_image": None if mask is None else _on_canvas(mask, job, canvas),
        # Kontext would choose another size for the source than for the output.
        "_auto_resize": False,
    }


def _reference_arguments(images: Sequence[Image.Image]) -> dict[str, Any]:
    references = [opaque(image) for image in images]
    return {"image": references if len(references) > 1 else references[0]}


def opaque(image: Image.Image) -> Image.Image:
    """RGB, with white behind transparent pixels."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _on_canvas(image: Image.Image, job: Job, canvas: Canvas) -> Image.Image:
    """Scale and centre-crop to the requested size, then repeat the last column and row to fill the canvas."""
    pixels = np.asarray(ImageOps.fit(image, (job.width, job.height), Image.Resampling.LANCZOS))
    right, bottom = canvas.width - job.width, canvas.height - job.height
    return Image.fromarray(np.pad(pixels, [(0, bottom), (0, right)] + [(0, 0)] * (pixels.ndim - 2), mode="edge"))
