from __future__ import annotations

import pytest
import torch
from torch import Tensor

from configs.parallel import ParallelDims
from pipelines.parallel.cfg import share_guidance
from pipelines.parallel.mesh import Mesh
from pipelines.parallel.sequence import shard_sequence
from tests import tiny_models
from tests.gang import Gang
from tests.pipelines.parallel import forwards
from tests.pipelines.parallel.comparison import Comparison, compare
from tests.pipelines.parallel.forwards import FORWARDS, MASKED, UNEVEN, Sizes

pytestmark = pytest.mark.gang

ALONE = ParallelDims(cfg_degree=2)
WITH_ULYSSES = ParallelDims(cfg_degree=2, ulysses_degree=2)
WITH_RING = ParallelDims(cfg_degree=2, ring_degree=2)
CALLED_TWICE = [name for name in FORWARDS if name not in ("Z-Image", "SD3")]


def guide(transformer: torch.nn.Module, prompt: dict, negative: dict | None) -> Tensor:
    """A step as pipelines that call the transformer twice make it, with the reference tokens cut off between."""
    predicted = transformer(**prompt)[0]
    predicted = predicted[:, : max(1, predicted.shape[1] // 2)]
    if negative is not None:
        unguided = transformer(**negative)[0][:, : predicted.shape[1]]
        predicted = unguided + 4.0 * (predicted - unguided)
    return predicted * 0.5


def guide_for_some_steps(mesh: Mesh, name: str, sizes: Sizes) -> list[Comparison]:
    """Guided and unguided steps in turn, as a pipeline with truncated guidance or several jobs in turn make them."""
    transformer = forwards.transformer(name)
    prompt = forwards.arguments(name, sizes)
    negative = {**prompt, "encoder_hidden_states": prompt["encoder_hidden_states"].flip(1)}
    steps = [(prompt, negative), (prompt, None), (negative, None), (prompt, negative), (negative, prompt)]
    expected = [guide(transformer, *step) for step in steps]
    shard_sequence(transformer, mesh)
    share_guidance(transformer, mesh)
    return [compare(guide(transformer, *step), whole) for step, whole in zip(steps, expected, strict=True)]


@pytest.mark.parametrize("name", CALLED_TWICE)
@pytest.mark.parametrize("dims", [ALONE, WITH_ULYSSES, WITH_RING], ids=str)
def test_two_calls_a_step_are_shared_and_single_calls_are_right_too(gang: Gang, name: str, dims: ParallelDims) -> None:
    for steps in zip(*gang.run(guide_for_some_steps, dims, name, UNEVEN), strict=True):
        assert steps[0].exact if dims != WITH_RING else steps[0].error <= 1e-5
        assert len({step.digest for step in steps}) == 1


def count_calls(mesh: Mesh, name: str, steps: int) -> int:
    """Forwards that this rank really computes in guided steps."""
    transformer = forwards.transformer(name)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    transformer.proj_out.register_forward_hook(count)
    share_guidance(transformer, mesh)
    arguments = forwards.arguments(name, UNEVEN)
    for _ in range(steps):
        guide(transformer, arguments, arguments)
    return calls


def test_each_half_computes_one_call_of_two(gang: Gang) -> None:
    assert gang.run(count_calls, ALONE, "Wan T2V", 3) == [3, 3]


def forward_batch(mesh: Mesh, name: str, all_sizes: list[Sizes]) -> list[Comparison]:
    transformer = forwards.transformer(name)
    arguments = [forwards.arguments(name, sizes) for sizes in all_sizes]
    expected = [forwards.output(transformer, each) for each in arguments]
    shard_sequence(transformer, mesh)
    share_guidance(transformer, mesh)
    return [compare(forwards.output(transformer, each), whole) for each, whole in zip(arguments, expected, strict=True)]


@pytest.mark.parametrize("name", ["Z-Image", "SD3"])
@pytest.mark.parametrize("dims", [ALONE, WITH_ULYSSES, WITH_RING], ids=str)
def test_a_batch_of_both_branches_is_shared_and_a_single_item_is_right_too(
    gang: Gang, name: str, dims: ParallelDims
) -> None:
    for items in zip(*gang.run(forward_batch, dims, name, [MASKED, UNEVEN]), strict=True):
        assert items[0].error <= 1e-6
        assert len({item.digest for item in items}) == 1


def share_unknown(mesh: Mesh) -> str:
    with pytest.raises(ValueError, match="CFG parallelism") as refusal:
        share_guidance(tiny_models.build(tiny_models.UNKNOWN_FAMILY).unet, mesh)
    return str(refusal.value)


def test_an_unknown_transformer_is_refused_by_name(gang: Gang) -> None:
    assert "not known for UNet2DConditionModel" in gang.run(share_unknown, ALONE)[0]
