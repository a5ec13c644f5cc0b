"""Whole generations on a gang whose halves share classifier-free guidance, against the same on one rank."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from configs.parallel import ParallelDims
from configs.server_args import ServerArgs
from pipelines.generation.generation import generate
from pipelines.job import Job, Result, Task
from pipelines.model.load import load_model
from pipelines.parallel.mesh import Mesh
from tests.gang import Gang
from tests.tiny_models import save

pytestmark = pytest.mark.gang

HALVES = ParallelDims(cfg_degree=2)
HALVES_OF_TWO = ParallelDims(cfg_degree=2, ulysses_degree=2)

WITH_GUIDANCE = {
    "wan2.1-t2v": {"guidance_scale": 5.0},
    "wan2.2-t2v": {"guidance_scale": 5.0, "guidance_scale_2": 3.0},
    "wan2.2-ti2v": {"guidance_scale": 5.0},
    "flux1": {"true_cfg_scale": 4.0, "negative_prompt": "blurred"},
    "qwen-image": {"true_cfg_scale": 4.0, "negative_prompt": "blurred"},
    "z-image": {"guidance_scale": 5.0},
    "sd3.5": {"guidance_scale": 7.0},
}
"""By family, what makes its pipeline compute both branches."""


def a_job(**parameters: object) -> Job:
    values = {"prompt": "a cat on a piano", "num_inference_steps": 3, "width": 64, "height": 48, "seeds": (5,)}
    return Job(id="a", task=Task.TEXT_TO_IMAGE, **{**values, **parameters})


def picture(mesh: Mesh | None, directory: Path, jobs: list[Job]) -> list[NDArray[np.float32]]:
    """Pixels of the jobs, run one after the other on one model; none on ranks other than 0."""
    size = 1 if mesh is None else mesh.size
    cfg = mesh is not None and mesh.dims.cfg_degree > 1
    args = ServerArgs(model_path=str(directory), device="cpu", dtype="fp32", num_gpus=size, enable_cfg_parallel=cfg)
    model = load_model(args, mesh)
    pixels = []
    for job in jobs:
        *_, result = generate(model, job, {})
        assert isinstance(result, Result)
        pixels += [np.asarray(Image.open(io.BytesIO(output.data)), np.float32) for output in result.outputs]
    return pixels


@pytest.mark.parametrize("dims", [HALVES, HALVES_OF_TWO], ids=["2 halves", "2 halves of 2"])
@pytest.mark.parametrize("family", WITH_GUIDANCE)
def test_halves_give_the_pixels_of_one_rank_with_and_without_guidance(
    gang: Gang, tmp_path: Path, family: str, dims: ParallelDims
) -> None:
    directory = save(family, tmp_path)
    without = {"guidance_scale": 1.0, "guidance_scale_2": None, "true_cfg_scale": None}
    jobs = [a_job(**WITH_GUIDANCE[family]), a_job(**without), a_job(**WITH_GUIDANCE[family])]
    alone = picture(None, directory, jobs)
    leader, *others = gang.run(picture, dims, directory, jobs)
    assert all(not pixels for pixels in others)
    for shared, whole in zip(leader, alone, strict=True):
        assert np.abs(shared - whole).max() <= 1, "8-bit pixels differ by more than a rounding"
    assert np.abs(alone[0] - alone[1]).max() > 1, "guidance had no effect"
