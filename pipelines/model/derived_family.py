"""A family for a model that no family lists, derived from the signatures of its pipeline's class.

Importing diffusers' table of related pipelines imports them all, so import this module for such models only.
"""

from __future__ import annotations

import inspect
from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_INPAINT_PIPELINES_MAPPING,
    _get_task_class,
)

from configs.model_family import Match, ModelFamily, SamplingDefaults
from pipelines.job import Task

REQUEST_PARAMETERS = ("negative_prompt", "guidance_scale", "guidance_scale_2", "true_cfg_scale", "strength")
"""Request parameters that pipelines know by the same name."""

SPATIAL_FACTORS = (
    "vae_scale_factor_spatial",
    "vae_spatial_scale_factor",
    "vae_spatial_compression_ratio",
    "vae_scale_factor",
)
TEMPORAL_FACTORS = ("vae_scale_factor_temporal", "vae_temporal_scale_factor", "vae_temporal_compression_ratio")
"""Pipelines' names for the number of pixels per side, and of frames, that their VAE compresses into one latent."""


def derive_family(pipeline: DiffusionPipeline) -> ModelFamily:
    """The tasks, parameters, limits and defaults that the pipeline's class declares. It runs on one rank only."""
    name = type(pipeline).__name__
    tasks = tasks_of(type(pipeline))
    accepted = ChainMap(*[dict(call_defaults(pipeline_class)) for pipeline_class in tasks.values()])
    parameters = {parameter for parameter in REQUEST_PARAMETERS if parameter in accepted}
    if "num_frames" in accepted:
        parameters |= {"num_frames", "fps"}
    edge = native_edge(pipeline)
    return ModelFamily(
        name=name,
        match=Match(pipelines=(name,)),
        tasks={task.value: pipeline_class.__name__ for task, pipeline_class in tasks.items()},
        parameters=frozenset(parameters),
        defaults=SamplingDefaults(
            width=accepted.get("width") or edge,
            height=accepted.get("height") or edge,
            num_inference_steps=accepted["num_inference_steps"],
            num_frames=accepted.get("num_frames") or 1,
            fps=round(accepted.get("frame_rate") or 16) if "num_frames" in accepted else 1,
            guidance_scale=accepted.get("guidance_scale"),
            true_cfg_scale=accepted.get("true_cfg_scale"),
            strength=accepted.get("strength"),
        ),
        # Latents are cut into patches of at most 2x2.
        size_multiple=2 * scale_factor(pipeline, *SPATIAL_FACTORS, default=8),
        frame_multiple=scale_factor(pipeline, *TEMPORAL_FACTORS, default=1),
        sharded=False,
    )


def tasks_of(pipeline_class: type[DiffusionPipeline]) -> dict[Task, type[DiffusionPipeline]]:
    """The tasks of a pipeline class, and those of its relatives that take the same modules."""
    accepted = call_defaults(pipeline_class)
    if "num_frames" in accepted:
        tasks = {Task.IMAGE_TO_VIDEO: pipeline_class} if "image" in accepted else {}
        return tasks or {Task.TEXT_TO_VIDEO: pipeline_class}
    if "mask_image" in accepted:
        return {Task.INPAINT: pipeline_class}
    if "strength" in accepted:
        return {Task.IMAGE_EDIT: pipeline_class}
    tasks = {Task.TEXT_TO_IMAGE: pipeline_class}
    related = {
        Task.IMAGE_EDIT: AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        Task.INPAINT: AUTO_INPAINT_PIPELINES_MAPPING,
    }
    for task, mapping in related.items():
        relative = _get_task_class(mapping, pipeline_class.__name__, throw_error_if_not_exist=False)
        if relative is not None:
            tasks[task] = relative
    if "image" in accepted:
        tasks[Task.IMAGE_EDIT] = pipeline_class
    return tasks


def call_defaults(pipeline_class: type[DiffusionPipeline]) -> Mapping[str, Any]:
    """Arguments of a pipeline's call with their default values; `Parameter.empty` for required ones."""
    parameters = inspect.signature(pipeline_class.__call__).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def native_edge(pipeline: DiffusionPipeline) -> int:
    """The width and height an image model was trained at, computed as pipelines do; 512 if unknown."""
    sample_size = getattr(pipeline, "default_sample_size", None)
    for name in ("unet", "transformer"):
        config = getattr(getattr(pipeline, name, None), "config", {})
        sample_size = sample_size or config.get("sample_size")
    if not isinstance(sample_size, int):
        return 512
    return sample_size * scale_factor(pipeline, *SPATIAL_FACTORS, default=8)


def scale_factor(pipeline: DiffusionPipeline, *names: str, default: int) -> int:
    """The value of the first of these attributes that the pipeline has, or `default`."""
    return next((getattr(pipeline, name) for name in names if hasattr(pipeline, name)), default)
