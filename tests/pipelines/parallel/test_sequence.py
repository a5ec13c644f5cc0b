from __future__ import annotations

import pytest
import torch
import torch._dynamo
from diffusers import UNet2DConditionModel, WanTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend
from torch._dynamo.testing import CompileCounter

from configs.parallel import ParallelDims
from pipelines.parallel.mesh import Mesh
from pipelines.parallel.plans import shardable
from pipelines.parallel.sequence import shard_sequence
from tests import tiny_models
from tests.gang import Gang
from tests.pipelines.parallel import forwards
from tests.pipelines.parallel.comparison import Comparison, compare
from tests.pipelines.parallel.forwards import (
    EVEN,
    FORWARDS,
    MASKED,
    MASKED_UNEVEN,
    SHORT_TEXT,
    UNEVEN,
    Sizes,
)

pytestmark = pytest.mark.gang

ULYSSES = ParallelDims(ulysses_degree=4)
RING = ParallelDims(ring_degree=4)
BOTH = ParallelDims(ulysses_degree=2, ring_degree=2)
DIMS = {"ulysses 4": ULYSSES, "ring 4": RING, "2x2": BOTH}


def compare_with_one_rank(mesh: Mesh, name: str, all_sizes: list[Sizes]) -> list[Comparison]:
    """Forwards of the same sharded transformer, one after the other. Rank 0 computes the whole ones too."""
    transformer = forwards.transformer(name)
    arguments = [forwards.arguments(name, sizes) for sizes in all_sizes]
    expected = [forwards.output(transformer, each) if mesh.rank == 0 else None for each in arguments]
    shard_sequence(transformer, mesh)
    return [compare(forwards.output(transformer, each), whole) for each, whole in zip(arguments, expected, strict=True)]


@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
@pytest.mark.parametrize("name", FORWARDS)
def test_a_sharded_forward_equals_the_whole_one(gang: Gang, name: str, dims: ParallelDims) -> None:
    all_sizes = [EVEN, UNEVEN, SHORT_TEXT]
    if FORWARDS[name].masks:
        all_sizes += [MASKED, MASKED_UNEVEN]
    by_rank = gang.run(compare_with_one_rank, dims, name, all_sizes)
    for sizes, *comparisons in zip(all_sizes, *by_rank, strict=True):
        assert comparisons[0].error <= 1e-5, sizes
        assert len({comparison.digest for comparison in comparisons}) == 1, f"the ranks differ at {sizes}"
        # With few tokens per rank, even a linear layer rounds differently: BLAS has other kernels for up to 8 rows.
        if dims == ULYSSES and sizes != SHORT_TEXT:
            assert comparisons[0].exact, sizes


def compare_in_bfloat16(mesh: Mesh, name: str) -> Comparison:
    transformer = forwards.transformer(name).to(torch.bfloat16)
    arguments = {
        key: value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in forwards.arguments(name, UNEVEN).items()
    }
    expected = forwards.output(transformer, arguments)
    shard_sequence(transformer, mesh)
    return compare(forwards.output(transformer, arguments).float(), expected.float())


@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
@pytest.mark.parametrize("name", ["Wan T2V", "FLUX.1", "Qwen-Image", "SD3"])
def test_weights_in_bfloat16_differ_by_their_rounding(gang: Gang, name: str, dims: ParallelDims) -> None:
    for comparison in gang.run(compare_in_bfloat16, dims, name):
        assert comparison.error <= 2e-2


def compare_with_backend(mesh: Mesh, name: str, backend: str) -> Comparison:
    transformer, reference = forwards.transformer(name), forwards.transformer(name)
    arguments = forwards.arguments(name, UNEVEN)
    with attention_backend(backend):  # `set_attention_backend` would leave it to all models of this process
        for each in (transformer, reference):
            each.set_attention_backend(backend)
        shard_sequence(transformer, mesh)
        return compare(forwards.output(transformer, arguments), forwards.output(reference, arguments))


@pytest.mark.parametrize("backend", ["_native_math", "flex"])
def test_ulysses_attends_with_the_chosen_backend(gang: Gang, backend: str) -> None:
    """Even with one that knows nothing of parallelism; the unsharded transformer beside it is not disturbed."""
    for comparison in gang.run(compare_with_backend, ULYSSES, "Wan T2V", backend):
        assert comparison.error <= 1e-6


def compare_unsharded_beside_sharded(mesh: Mesh, name: str) -> Comparison:
    """An unsharded transformer, before and after others are sharded, with another input on each rank: a collective
    would mix them."""
    transformer = forwards.transformer(name)
    arguments = forwards.arguments(name, UNEVEN)
    arguments["hidden_states"] *= mesh.rank + 1
    expected = forwards.output(transformer, arguments)
    for _ in range(2):
        shard_sequence(forwards.transformer(name), mesh)
    return compare(forwards.output(transformer, arguments), expected)


def test_a_transformer_beside_a_sharded_one_stays_what_it_was(gang: Gang) -> None:
    by_rank = gang.run(compare_unsharded_beside_sharded, BOTH, "Wan T2V")
    assert all(comparison.exact for comparison in by_rank)
    assert len({comparison.digest for comparison in by_rank}) == 4


def compare_compiled(mesh: Mesh, name: str, all_sizes: list[Sizes]) -> tuple[list[Comparison], int]:
    """Also return the number of graphs that were compiled."""
    torch._dynamo.reset()
    transformer = forwards.transformer(name)
    if name == "Wan T2V":  # the first block and the last are compiled differently, those between like the last
        del transformer.blocks[1:-1]
    arguments = [forwards.arguments(name, sizes) for sizes in all_sizes]
    expected = [forwards.output(transformer, each) for each in arguments]
    shard_sequence(transformer, mesh)
    graphs = CompileCounter()
    transformer.compile_repeated_blocks(fullgraph=False, backend=graphs)
    outputs = [forwards.output(transformer, each) for each in arguments]
    return [compare(*results) for results in zip(outputs, expected, strict=True)], graphs.frame_count


@pytest.mark.parametrize(
    ("name", "dims"),
    {"Wan T2V": ParallelDims(ulysses_degree=2), "Z-Image": ParallelDims(ring_degree=2)}.items(),
)
def test_a_compiled_transformer_is_right_for_every_length(gang: Gang, name: str, dims: ParallelDims) -> None:
    """The graphs are real; the compiler behind them, which takes half a minute, is left out."""
    for comparisons, graphs in gang.run(compare_compiled, dims, name, [EVEN, UNEVEN]):
        assert graphs > 0
        assert all(comparison.error <= 1e-5 for comparison in comparisons)


def shard_twice(mesh: Mesh) -> str:
    transformer = forwards.transformer("Wan T2V")
    shard_sequence(transformer, mesh)
    with pytest.raises(ValueError, match="already exists") as refusal:
        shard_sequence(transformer, mesh)
    return str(refusal.value)


def test_sharding_twice_is_refused(gang: Gang) -> None:
    gang.run(shard_twice, BOTH)


def shard_a_unet(mesh: Mesh) -> str:
    with pytest.raises(ValueError, match="cannot be sharded") as refusal:
        shard_sequence(tiny_models.build(tiny_models.UNKNOWN_FAMILY).unet, mesh)
    return str(refusal.value)


def test_a_model_without_a_plan_is_refused_by_name(gang: Gang) -> None:
    assert gang.run(shard_a_unet, BOTH)[0].startswith("UNet2DConditionModel cannot be sharded")
    assert not shardable(UNet2DConditionModel)
    assert shardable(WanTransformer3DModel)
