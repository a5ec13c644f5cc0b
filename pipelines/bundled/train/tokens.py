"""Steps on some of the tokens, so that two cores can train on large images at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel


def draw_tokens(count: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Ascending indices of `share` of `count` tokens; all of them if `share` is 1."""
    if share == 1:
        return torch.arange(count, device=generator.device)
    return torch.randperm(count, generator=generator, device=generator.device)[: round(share * count)].sort().values


@contextmanager
def on_tokens(transformer: WanTransformer3DModel, kept: torch.Tensor) -> Iterator[None]:
    """Make `transformer` compute only these tokens, each at its own position, and predict zeros for the others.

    Self-attention is quadratic: at 1024x1024 (4096 tokens) a step on a quarter of them takes a ninth of the time.
    Attention among few tokens is also sharper, so such training should end with some steps on all of them (Liu et al.
    2022, "PatchDropout"; Zheng et al. 2023, "MaskDiT").

    Args:
        kept: `(K,)`, indices into the tokens in the order of the transformer's sequence: frame, row, column. Per-token
            timesteps must be those of the kept tokens.
    """
    count = 0

    def embed(_module: torch.nn.Module, _inputs: object, embedded: torch.Tensor) -> torch.Tensor:
        nonlocal count
        sequence = embedded.flatten(2)
        count = sequence.shape[2]
        return sequence[:, :, kept]

    def rotate(_module: torch.nn.Module, _inputs: object, rotary: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(each[:, kept] for each in rotary)

    def scatter(_module: torch.nn.Module, _inputs: object, projected: torch.Tensor) -> torch.Tensor:
        everywhere = projected.new_zeros(projected.shape[0], count, projected.shape[2])
        return everywhere.index_copy(1, kept, projected)

    hooks = (
        transformer.patch_embedding.register_forward_hook(embed),
        transformer.rope.register_forward_hook(rotate),
        transformer.proj_out.register_forward_hook(scatter),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
