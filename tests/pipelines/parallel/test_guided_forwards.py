"""Forwards of every family on a gang whose halves share guidance, against the same on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from configs.parallel import ParallelDims
from pipelines.parallel.guidance import Guidance, share_guidance
from pipelines.parallel.mesh import Mesh
from pipelines.parallel.sequence import shard_sequence
from tests.gang import Gang
from tests.pipelines.parallel import forwards
from tests.pipelines.parallel.comparison import Comparison, compare
from tests.pipelines.parallel.forwards import FORWARDS, MASKED, UNEVEN, Sizes

pytestmark = pytest.mark.gang

HALVES = ParallelDims(cfg_degree=2)
HALVES_OF_ULYSSES = ParallelDims(cfg_degree=2, ulysses_degree=2)
HALVES_OF_RING = ParallelDims(cfg_degree=2, ring_degree=2)
DIMS = {"2 halves": HALVES, "2 halves of ulysses 2": HALVES_OF_ULYSSES, "2 halves of ring 2": HALVES_OF_RING}
BATCHED = ("Z-Image", "SD3")
"""Families whose pipelines put both branches into one batch."""


class Scheduler:
    """Stands in for a job's: the first to read what an unguided step predicts."""

    def step(self, predicted: Tensor) -> Tensor:
        return 0.5 * predicted


def step(transformer: torch.nn.Module, scheduler: Scheduler, prompt: Any, negative: Any | None) -> Tensor:
    """One denoising step as pipelines make it: the tokens of reference images are cut off between the two calls."""
    predicted = transformer(**prompt)[0]
    predicted = predicted[:, : predicted.shape[1] // 2]
    if negative is not None:
        unguided = transformer(**negative)[0][:, : predicted.shape[1]]
        predicted = unguided + 4.0 * (predicted - unguided)
    return scheduler.step(predicted)


def compare_steps(mesh: Mesh, name: str, sizes: Sizes) -> list[Comparison]:
    """Guided and unguided steps in turn."""
    transformer = forwards.transformer(name)
    prompt = forwards.arguments(name, sizes)
    negative = {**prompt, "encoder_hidden_states": prompt["encoder_hidden_states"].flip(1)}
    steps = [(prompt, negative), (prompt, None), (negative, None), (prompt, negative), (negative, prompt)]
    expected = [step(transformer, Scheduler(), *arguments) if mesh.rank == 0 else None for arguments in steps]
    scheduler = Scheduler()
    shard_sequence(transformer, mesh)
    share_guidance([transformer], mesh).attend(scheduler)
    shared = [step(transformer, scheduler, *arguments) for arguments in steps]
    return [compare(*results) for results in zip(shared, expected, strict=True)]


@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
@pytest.mark.parametrize("name", [name for name in FORWARDS if name not in BATCHED])
def test_guided_and_unguided_steps_equal_those_of_one_rank(gang: Gang, name: str, dims: ParallelDims) -> None:
    for comparisons in zip(*gang.run(compare_steps, dims, name, UNEVEN), strict=True):
        assert comparisons[0].error <= 1e-5
        assert comparisons[0].exact or dims == HALVES_OF_RING
        assert len({comparison.digest for comparison in comparisons}) == 1, "the ranks differ"


def compare_batches(mesh: Mesh, name: str, all_sizes: list[Sizes]) -> list[Comparison]:
    transformer = forwards.transformer(name)
    arguments = [forwards.arguments(name, sizes) for sizes in all_sizes]
    expected = [forwards.output(transformer, each) if mesh.rank == 0 else None for each in arguments]
    shard_sequence(transformer, mesh)
    share_guidance([transformer], mesh)
    return [compare(forwards.output(transformer, each), whole) for each, whole in zip(arguments, expected, strict=True)]


@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_of_both_branches_and_a_batch_of_one_equal_those_of_one_rank(
    gang: Gang, name: str, dims: ParallelDims
) -> None:
    for comparisons in zip(*gang.run(compare_batches, dims, name, [MASKED, UNEVEN]), strict=True):
        assert comparisons[0].error <= 1e-5
        assert len({comparison.digest for comparison in comparisons}) == 1, "the ranks differ"


def count_forwards(mesh: Mesh, name: str, guided_steps: int) -> int:
    """How many forwards this rank computes in `guided_steps` steps of two calls."""
    transformer = forwards.transformer(name)
    computed = []
    transformer.proj_out.register_forward_hook(lambda *_: computed.append(1))
    scheduler = Scheduler()
    share_guidance([transformer], mesh).attend(scheduler)
    arguments = forwards.arguments(name, UNEVEN)
    for _ in range(guided_steps):
        step(transformer, scheduler, arguments, arguments)
    return len(computed)


def test_each_half_computes_one_of_two_calls(gang: Gang) -> None:
    assert gang.run(count_forwards, HALVES, "Wan T2V", 3) == [3, 3]


def guide_after_a_failure(mesh: Mesh, name: str) -> Comparison:
    """A job that fails between its two calls, then another job."""
    transformer = forwards.transformer(name)
    arguments = forwards.arguments(name, UNEVEN)
    expected = step(transformer, Scheduler(), arguments, arguments)
    guidance: Guidance = share_guidance([transformer], mesh)
    guidance.attend(Scheduler())
    transformer(**arguments)
    scheduler = Scheduler()
    guidance.attend(scheduler)
    return compare(step(transformer, scheduler, arguments, arguments), expected)


def test_a_job_that_failed_between_its_two_calls_leaves_nothing_to_the_next(gang: Gang) -> None:
    assert all(comparison.exact for comparison in gang.run(guide_after_a_failure, HALVES, "Wan T2V"))
