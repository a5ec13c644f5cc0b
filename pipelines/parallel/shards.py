"""How a token sequence is distributed over ranks in unequal shards, and how it is split and gathered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.parallel.mesh import Mesh, all_gather_single
from pipelines.parallel.plans import Streams


def shard(x: Tensor, dim: int, mesh: Mesh) -> Tensor:
    """This rank's piece of `x` (a view). If the tokens do not divide evenly, the first ranks get one more."""
    return x.tensor_split(mesh.dims.sp_degree, dim)[mesh.sequence_rank]


def shard_lengths(total: int, ranks: int) -> tuple[int, ...]:
    """The number of tokens that `shard` leaves on each rank."""
    return tuple(total // ranks + (rank < total % ranks) for rank in range(ranks))


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one or several streams are when each stream is split separately.

    With text `t` and image `i` over two ranks, the whole sequence is `t0 t1 t2 t3 i0 i1 i2 i3`, and the ranks' shards
    one after the other are `t0 t1 i0 i1 t2 t3 i2 i3`.
    """

    lengths: tuple[int, ...]
    """Tokens on each rank."""
    to_shards: Tensor | None
    """(S,) `whole[to_shards]` is the sequence in shard order; None if the orders are the same."""
    from_shards: Tensor | None
    """(S,) the inverse."""


@lru_cache(maxsize=256)
def layout(totals: tuple[int, ...], ranks: int, device: torch.device) -> Layout:
    """The layout of streams that have `totals` tokens."""
    lengths = [shard_lengths(total, ranks) for total in totals]
    tokens_on_rank = tuple(map(sum, zip(*lengths, strict=True)))
    if len(totals) == 1:
        return Layout(tokens_on_rank, None, None)
    streams = torch.arange(sum(totals), device=device).split(totals)
    pieces = zip(*(stream.tensor_split(ranks) for stream in streams), strict=True)
    to_shards = torch.cat([torch.cat(piece) for piece in pieces])
    return Layout(tokens_on_rank, to_shards, to_shards.argsort())


class ShardedSequence:
    """A token sequence over the ranks of `mesh.sequence`, as it is in the current forward.

    Every rank sees whole inputs before it splits them, so it knows all lengths without communication.
    """

    def __init__(self, mesh: Mesh, streams: Streams):
        self.mesh = mesh
        self.streams = streams
        self.layout: Layout
        self._key_mask: Tensor | None = None

    @torch.compiler.disable  # it would trace past the cache of `layout`, for every length
    def begin(self, totals: Mapping[str, int]) -> None:
        """Begin a forward whose streams have `totals` tokens."""
        totals_in_order = tuple(totals[name] for name in self.streams)
        self.layout = layout(totals_in_order, self.mesh.dims.sp_degree, self.mesh.device)
        self._key_mask = None

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The whole tensor, in shard order, of which each rank holds its shard `x`."""
        # Only gathers of equally sized tensors exist in both gloo and NCCL: pad, gather, trim.
        longest = max(self.layout.lengths)
        mine = x.movedim(dim, 0)
        mine = F.pad(mine, [0, 0] * (x.dim() - 1) + [0, longest - len(mine)]).contiguous()
        everyones = mine.new_empty(len(self.layout.lengths) * longest, *mine.shape[1:])
        all_gather_single(everyones, mine, group=self.mesh.sequence)
        shards = zip(everyones.split(longest), self.layout.lengths, strict=True)
        return torch.cat([piece[:length] for piece, length in shards]).movedim(0, dim)

    def key_mask(self, mask: Tensor) -> Tensor:
        """The whole (B, S) mask, in shard order, of which `mask` has this rank's columns.

        Gathered once per forward, not per layer: transformers mask padding, which is the same in all layers.
        """
        if self._key_mask is None:
            self._key_mask = self.gather(mask.reshape(len(mask), self.layout.lengths[self.mesh.sequence_rank]), dim=1)
        return self._key_mask
