"""Whole jobs of every family on a gang, in which rank 0 alone has encoders, against the same on one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from configs.model_family import families
from configs.parallel import ParallelDims
from pipelines.job import Task
from pipelines.model.load import Model
from tests import tiny_models
from tests.gang import Gang
from tests.pipelines.parallel.generations import compare_latents, latents

pytestmark = pytest.mark.gang

DIMS = {
    "2x2": ParallelDims(ulysses_degree=2, ring_degree=2),
    "2 halves of ulysses 2": ParallelDims(cfg_degree=2, ulysses_degree=2),
}
TASKS = [
    (name, Task(task))
    for name in tiny_models.FAMILIES
    for task in next(family for family in families() if family.name == name).tasks
]


@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
@pytest.mark.parametrize(("name", "task"), TASKS)
def test_a_job_ends_with_the_latents_of_one_rank(
    gang: Gang,
    tiny_model: Callable[[str], Model],
    tiny_model_path: Callable[[str], Path],
    name: str,
    task: Task,
    dims: ParallelDims,
) -> None:
    expected = latents(tiny_model(name), task)
    comparisons = gang.run(compare_latents, dims, tiny_model_path(name), task, expected)
    assert comparisons[0].error <= 1e-5
    assert len({comparison.digest for comparison in comparisons}) == 1, "the ranks differ"
