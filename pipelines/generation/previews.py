"""Images of unfinished latents, made with the decoder of the pipeline that is denoising them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from pipelines.generation.stepping import StepBar


def preview_steps(steps: int, count: int) -> list[int]:
    """The steps after which to make a preview: at most `count`, evenly spaced, none after the last step."""
    return sorted({steps * i // (count + 1) for i in range(1, count + 1)} - {0})


class DenoisedEstimate:
    """An estimate of the finished latents, from a scheduler's most recent step.

    Wraps `scheduler.step`, so the scheduler must belong to one job alone.
    """

    def __init__(self, scheduler: SchedulerMixin):
        self._scheduler = scheduler
        self._step = scheduler.step
        scheduler.step = self._watched_step

    def _watched_step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kw: Any
    ) -> Any:
        result = self._step(model_output, timestep, sample, *args, **kw)
        self._last = model_output, sample, result
        return result

    def latents(self) -> torch.Tensor:
        """The estimate, in the pipeline's own latent layout.

        A sample is x = x0 + sigma * output, both in flow matching, where the output is the velocity noise - x0, and
        with schedulers that scale predicted noise by sigma (EulerDiscreteScheduler). Other schedulers have no sigmas,
        so their latents are shown as they are.
        """
        model_output, sample, result = self._last
        if not hasattr(self._scheduler, "sigmas"):
            return result[0]
        sigma = self._scheduler.sigmas[self._scheduler.step_index - 1]
        return (sample.float() - sigma.to(sample.device) * model_output.float()).to(sample.dtype)


def can_decode_latents(pipeline: DiffusionPipeline) -> bool:
    """Whether the pipeline can be told to skip its steps."""
    return hasattr(type(pipeline), "interrupt") and hasattr(pipeline, "prepare_latents")


def decode_latents(pipeline: DiffusionPipeline, latents: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
    """Decode latents as the pipeline does at its end: call it with these as its initial latents and skip every step.

    This way each pipeline's own unpacking, scaling and decoding apply.

    Args:
        pipeline: a view that nothing else uses; unusable afterwards.
        arguments: those of the call that made the latents.

    Returns:
        Pixels in [0, 1], `(1, 3, H, W)`, or `(1, F, 3, H, W)` from a video model.
    """
    prepare_latents = pipeline.prepare_latents

    def prepared(*args: Any, **kwargs: Any) -> Any:
        made = prepare_latents(*args, **kwargs)
        return (latents, *made[1:]) if isinstance(made, tuple) else latents

    def skipping_bar(iterable: Iterable[Any] | None = None, total: int | None = None) -> StepBar:
        pipeline._interrupt = True
        return StepBar(list(iterable or ()), lambda step, steps: None)

    pipeline.prepare_latents = prepared
    pipeline.progress_bar = skipping_bar
    return pipeline(**arguments, generator=torch.Generator("cpu"), output_type="pt", return_dict=False)[0]
