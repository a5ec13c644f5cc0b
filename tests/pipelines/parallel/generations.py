"""A job's latents as its pipeline leaves them, before they become 8-bit pixels."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from configs.server_args import ServerArgs
from pipelines.generation.arguments import call_arguments
from pipelines.generation.generation import decoded_inputs
from pipelines.job import Task
from pipelines.model.load import Model, load_model
from pipelines.parallel.mesh import Mesh
from tests import tiny_models
from tests.pipelines.conftest import make_job
from tests.pipelines.parallel.comparison import Comparison, compare


def latents(model: Model, task: Task) -> Tensor:
    """Of a small job with the family's defaults, whose sizes are not multiples of any in which the model computes."""
    job, media = make_job(model, task)
    pipeline = model.pipeline_for(task)
    pipeline.set_progress_bar_config(disable=True)
    if model.guidance is not None:
        model.guidance.attend(pipeline.scheduler)
    return pipeline(
        **call_arguments(type(pipeline), model.card.family, job, *decoded_inputs(job, media)),
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        return_dict=False,
    )[0]


@lru_cache(maxsize=1)
def sharded_model(mesh: Mesh, path: Path) -> Model:
    """The model saved at `path`, for the test after as well. None may change it."""
    dims = mesh.dims
    args = ServerArgs(
        model_path=str(path),
        device="cpu",
        dtype="fp32",
        num_gpus=dims.num_gpus,
        ulysses_degree=dims.ulysses_degree,
        ring_degree=dims.ring_degree,
        enable_cfg_parallel=dims.cfg_degree == 2,
    )
    return load_model(args, mesh)


def compare_latents(mesh: Mesh, path: Path, task: Task, expected: Tensor) -> Comparison:
    """This rank's latents of the model saved at `path` against those of one rank."""
    with tiny_models.small_reference_images():
        return compare(latents(sharded_model(mesh, path), task), expected)
