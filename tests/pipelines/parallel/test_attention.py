"""Sharded attention by itself, against PyTorch's over the whole sequence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.parallel import ParallelDims
from pipelines.parallel.attention import sharded_attention
from pipelines.parallel.mesh import Mesh
from pipelines.parallel.shards import ShardedSequence, shard
from tests.gang import Gang
from tests.pipelines.parallel.comparison import Comparison, compare

pytestmark = pytest.mark.gang

ULYSSES = ParallelDims(ulysses_degree=4)
DIMS = {
    "ulysses 4": ULYSSES,
    "ring 4": ParallelDims(ring_degree=4),
    "2x2": ParallelDims(ulysses_degree=2, ring_degree=2),
}


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


def padding(batch: int, total: int) -> Tensor:
    """The first item sees every token, each later one fewer; the last sees none that the last three ranks hold."""
    return (
        torch.arange(total)
        < torch.tensor([total - item * (total * 4 // 5) // max(1, batch - 1) for item in range(batch)])[:, None]
    )


def boolean(batch: int, total: int) -> Tensor:
    return padding(batch, total)


def additive(batch: int, total: int) -> Tensor:
    return torch.zeros(batch, total).masked_fill(~padding(batch, total), float("-inf"))


def biased(batch: int, total: int) -> Tensor:
    """A bias that neither shows nor hides a token."""
    return torch.randn(batch, total, generator=torch.Generator().manual_seed(2))


def none(batch: int, total: int) -> None:
    return None


MASKS = {"no mask": none, "boolean": boolean, "additive": additive, "biased": biased}


def compare_attention(
    mesh: Mesh,
    totals: list[int],
    heads: int,
    dtype: torch.dtype,
    make_mask: Callable[[int, int], Tensor | None],
    batch: int = 3,
) -> Comparison:
    """Compare this rank's part of the result, for two streams of `totals` tokens, with that part of the whole."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, batch, sum(totals), heads, 16, generator=generator).to(dtype).unbind()
    mask = make_mask(batch, sum(totals))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    sequence = ShardedSequence(mesh, ("text", "image"))
    sequence.begin(dict(zip(("text", "image"), totals, strict=True)))

    def on_this_rank(x: Tensor) -> Tensor:
        return torch.cat([shard(stream, 1, mesh) for stream in x.split(totals, dim=1)], dim=1)

    shards = map(on_this_rank, (query, key, value))
    result = sharded_attention(*shards, None if mask is None else on_this_rank(mask), None, sequence, attend)
    expected = attend(query, key, value, None if mask is None else mask[:, None, None])
    return compare(result, on_this_rank(expected))


@pytest.mark.parametrize("make_mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("heads", [8, 6])
@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
def test_it_equals_attention_over_the_whole_sequence(
    gang: Gang, dims: ParallelDims, heads: int, make_mask: Callable[[int, int], Tensor | None]
) -> None:
    for totals in ([16, 64], [13, 63], [3, 42]):
        for comparison in gang.run(compare_attention, dims, totals, heads, torch.float32, make_mask):
            assert comparison.error <= 1e-6, totals
            assert comparison.exact or dims != ULYSSES, totals


@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
def test_in_bfloat16_it_is_as_close_as_bfloat16_is(gang: Gang, dims: ParallelDims) -> None:
    for comparison in gang.run(compare_attention, dims, [13, 63], 8, torch.bfloat16, boolean):
        assert comparison.error <= 1e-2
        assert comparison.exact or dims != ULYSSES
