"""Runs the pipeline that a family names for a task, without the server."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from configs.model_family import ModelFamily
from pipelines.job import Task

SIZE = 64
FRAMES = 5


def sibling(pipeline: DiffusionPipeline, class_name: str) -> DiffusionPipeline:
    """A pipeline of another class with the very components and settings of `pipeline`."""
    pipeline_class = getattr(diffusers, class_name)
    available = {**pipeline.config, **pipeline.components}
    wanted = set(inspect.signature(pipeline_class.__init__).parameters) & set(available)
    other = pipeline_class(**{name: available[name] for name in wanted})
    other.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "vae_scale_factor_spatial"):
        other.vae_scale_factor_spatial = pipeline.vae_scale_factor_spatial  # Wan's editing pipeline guesses it
    return other


def call_parameters(class_name: str) -> set[str]:
    return set(inspect.signature(getattr(diffusers, class_name).__call__).parameters)


def generate(
    pipeline: DiffusionPipeline,
    family: ModelFamily,
    task: Task,
    prompt: str = "a cat playing the piano",
    seed: int = 1,
    colors: tuple[str, ...] = ("crimson",),
    **parameters: Any,
) -> np.ndarray:
    """Two steps of `task` at 64x64, with an input image of each of `colors` where the task has any.

    Returns: (F, H, W, 3) in [0, 1]; one frame for an image.
    """
    other = sibling(pipeline, family.tasks[task])
    images = [Image.new("RGB", (SIZE, SIZE), color) for color in colors]
    mask = Image.new("L", (SIZE, SIZE), "black")
    mask.paste("white", (0, 0, SIZE // 2, SIZE))
    defaults = family.defaults_for(task).model_dump(include=set(family.parameters), exclude_none=True)
    offered: dict[str, Any] = {
        **defaults,
        "prompt": prompt,
        "width": SIZE,
        "height": SIZE,
        "num_frames": FRAMES if task.is_video else 1,
        "max_area": SIZE * SIZE,
        "_auto_resize": False,
        "num_inference_steps": 2,
        **parameters,
    }
    if task in (Task.IMAGE_EDIT, Task.INPAINT, Task.IMAGE_TO_VIDEO):
        offered |= {"image": images if len(images) > 1 else images[0], "video": images[:1]}
    if task is Task.INPAINT:
        offered |= {"image": images[0], "image_reference": images[1:] or None, "mask_image": mask}
    accepted = call_parameters(family.tasks[task])
    result = other(
        **{name: value for name, value in offered.items() if name in accepted},
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        return_dict=False,
    )[0]
    return result[0] if result.ndim == 5 else result
