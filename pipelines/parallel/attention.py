"""Ulysses x ring attention over unequal shards of tokens.

Ulysses: ranks trade heads for tokens (one all-to-all before attention, one after it), so that each attends with a part
of the heads over the tokens of all its Ulysses peers. Ring: the keys and values of these peers then travel round a
ring, and every rank merges its partial results by the log-sum-exp of the scores. The collectives are the same on gloo
and NCCL.

Shapes, here and below: B batch; L tokens of this rank; C tokens of its Ulysses peers, one chunk of the ring; S all
tokens; H heads; h heads of this rank between the two all-to-alls; D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipelines.parallel.mesh import Mesh
from pipelines.parallel.shards import Layout, ShardedSequence

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention within one rank: (B, S, h, D) queries, keys and values and a (B, 1, 1, S) mask to (B, S, h, D)."""

aten = torch.ops.aten

AMPERE = (8, 0)
"""The lowest compute capability on which PyTorch's flash kernel runs."""


@torch.compiler.disable
def sharded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    sequence: ShardedSequence,
    attend: Attend,
) -> Tensor:
    """Attention of this rank's tokens to the tokens of all ranks.

    Args:
        query, key, value: (B, L, H, D).
        mask: this rank's columns of a mask over keys, (B, L) or (B, 1, 1, L): boolean (True is seen) or additive.
        scale: of the scores; None is `D ** -0.5`.
        sequence: how the tokens are distributed over the ranks.
        attend: attention within one rank, used where there is no ring. It gets all tokens in their true order and some
            of the heads, so for these heads it computes, bit for bit, the same as unsharded attention.

    Returns:
        (B, L, H, D)
    """
    mesh, layout = sequence.mesh, sequence.layout
    degree, heads = mesh.dims.ulysses_degree, query.shape[2]
    chunks = [layout.lengths[first : first + degree] for first in range(0, len(layout.lengths), degree)]
    peers = chunks[mesh.ring_rank]
    key_mask = None if mask is None else sequence.key_mask(mask)

    qkv = heads_to_tokens([query, key, value], peers, mesh)
    if mesh.dims.ring_degree == 1:
        out = attention_in_order(qkv, key_mask, layout, attend)
    else:
        out = attention_round_ring(qkv, key_mask, scale, [sum(chunk) for chunk in chunks], mesh)
    return tokens_to_heads(out, peers, mesh)[:, :, :heads]


def attention_in_order(qkv: Tensor, key_mask: Tensor | None, layout: Layout, attend: Attend) -> Tensor:
    """Attention where the Ulysses peers hold all tokens: (S, 3, B, h, D) and a (B, S) mask to (S, B, h, D)."""
    if layout.from_shards is not None:
        qkv = qkv.index_select(0, layout.from_shards)
        key_mask = None if key_mask is None else key_mask.index_select(1, layout.from_shards)
    query, key, value = qkv.permute(1, 2, 0, 3, 4)  # (B, S, h, D) each
    out = attend(query, key, value, None if key_mask is None else key_mask[:, None, None])  # (B, S, h, D)
    out = out.transpose(0, 1)  # (S, B, h, D)
    return out if layout.to_shards is None else out.index_select(0, layout.to_shards)


def attention_round_ring(
    qkv: Tensor, key_mask: Tensor | None, scale: float | None, lengths: Sequence[int], mesh: Mesh
) -> Tensor:
    """Attention where each rank of a ring holds `lengths` tokens: (C, 3, B, h, D) and a (B, S) mask to (C, B, h, D)."""
    query, *key_value = qkv.permute(1, 2, 3, 0, 4)  # (B, h, C, D) each
    kv = torch.stack(key_value)  # (2, B, h, C, D)
    out = ring_attention(query, kv, key_mask, scale, lengths, mesh)  # (B, h, C, D)
    return out.permute(2, 0, 1, 3)  # (C, B, h, D)


def heads_to_tokens(tensors: Sequence[Tensor], lengths: Sequence[int], mesh: Mesh) -> Tensor:
    """Trade heads for tokens with the Ulysses peers, who hold `lengths` tokens: N tensors (B, L, H, D) at once.

    Heads that do not divide evenly are padded with zeros, which `sharded_attention` trims from its output.

    Returns:
        (C, N, B, h, D)
    """
    degree = mesh.dims.ulysses_degree
    if degree == 1:
        return torch.stack([x.transpose(0, 1) for x in tensors], dim=1)
    # u is the Ulysses degree.
    filled = [F.pad(x, (0, 0, 0, -x.shape[2] % degree)) for x in tensors]  # (B, L, u * h, D) each
    to_peers = [x.unflatten(2, (degree, -1)).permute(2, 1, 0, 3, 4) for x in filled]  # (u, L, B, h, D) each
    sent = torch.stack(to_peers, dim=2).flatten(0, 1)  # (u * L, N, B, h, D)
    received = sent.new_empty(sum(lengths), *sent.shape[1:])
    dist.all_to_all_single(received, sent, list(lengths), [lengths[mesh.ulysses_rank]] * degree, group=mesh.ulysses)
    return received


def tokens_to_heads(x: Tensor, lengths: Sequence[int], mesh: Mesh) -> Tensor:
    """The way back: (C, B, h, D) to (B, L, H, D)."""
    degree, mine = mesh.dims.ulysses_degree, lengths[mesh.ulysses_rank]
    if degree == 1:
        return x.transpose(0, 1)
    received = x.new_empty(degree * mine, *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), [mine] * degree, list(lengths), group=mesh.ulysses)
    from_peers = received.unflatten(0, (degree, mine))  # (u, L, B, h, D)
    return from_peers.permute(2, 1, 0, 3, 4).flatten(2, 3)


def ring_attention(
    query: Tensor, kv: Tensor, key_mask: Tensor | None, scale: float | None, lengths: Sequence[int], mesh: Mesh
) -> Tensor:
    """Attend to each rank's keys and values as they travel round the ring.

    Args:
        query: (B, h, C, D) this rank's.
        kv: (2, B, h, C, D) this rank's keys and values, contiguous.
        key_mask: (B, S) over the keys of all ranks, or None.
        scale: of the scores.
        lengths: tokens of each rank in the ring.

    Returns:
        (B, h, C, D)
    """
    degree, rank = mesh.dims.ring_degree, mesh.ring_rank
    masks = [None] * degree if key_mask is None else additive_masks(key_mask, query, lengths)
    for step in range(degree):
        source = (rank - step) % degree
        transfers = []
        if step < degree - 1:
            arriving = kv.new_empty(*kv.shape[:3], lengths[source - 1], kv.shape[-1])
            transfers = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, kv, group=mesh.ring, group_peer=(rank + 1) % degree),
                    dist.P2POp(dist.irecv, arriving, group=mesh.ring, group_peer=(rank - 1) % degree),
                ]
            )
        chunk_out, chunk_lse = attention_with_lse(query, kv[0], kv[1], masks[source], scale)
        if step == 0:
            out, lse = chunk_out, chunk_lse
        else:
            # The softmax over both, o = (e^a * o_a + e^b * o_b) / (e^a + e^b), without exponentials that overflow.
            out = out + torch.sigmoid(chunk_lse - lse) * (chunk_out - out)
            lse = torch.logaddexp(lse, chunk_lse)
        for transfer in transfers:
            transfer.wait()
        if transfers:
            kv = arriving
    return out.to(query.dtype)


def additive_masks(key_mask: Tensor, query: Tensor, lengths: Sequence[int]) -> list[Tensor | None]:
    """The (B, S) `key_mask` as additive masks of the scores, one (B, h, C, length) for each of `lengths`."""
    # Not -inf: for a chunk without a visible key, kernels then return a log-sum-exp of 0, -inf or NaN. With this value
    # it is always about -1e30, which weighs nothing in a merge. finfo.min itself overflows where kernels multiply it by
    # log2(e).
    hidden = max(-1e30, torch.finfo(query.dtype).min)
    if key_mask.dtype == torch.bool:
        scores = torch.zeros_like(key_mask, dtype=query.dtype).masked_fill_(~key_mask, hidden)
    else:
        scores = key_mask.to(query.dtype).clamp_min(hidden)
    masks: list[Tensor | None] = []
    for chunk in scores.split(list(lengths), dim=1):
        length = chunk.shape[1]
        # The memory-efficient kernel loads 16 bytes at a time: each row must start at a multiple of 16 bytes.
        aligned = F.pad(chunk, (0, -length % 16))[:, None, None, :length]
        masks.append(aligned.expand(-1, *query.shape[1:3], -1).expand(len(query), -1, -1, -1))
    return masks


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention within one rank that also returns the log-sum-exp of its scores.

    The CUDA kernels are those behind PyTorch's own SDPA; `torch.nn.attention.activate_flash_attention_impl("FA3")`
    makes the first of them FlashAttention 3.

    Args:
        query, key, value: (B, h, C, D).
        mask: (B, h, C, C) additive, or None.

    Returns:
        (B, h, C, D) and (B, h, C, 1), both in float32, the precision in which shards are merged.
    """
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask, scale=scale)
    elif mask is None and query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= AMPERE:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    else:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, mask, True, scale=scale)
    # The memory-efficient kernel rounds the length of its log-sum-exp up to a multiple of 32.
    return out.float(), lse[..., : query.shape[2], None].float()
