"""Cross-attention to text padded as in serving, at the cost of the text alone.

`WanPipeline` pads the encoded prompt with zeros to 512 tokens and masks none of them, so they take their share of every
softmax. A model trained without them would behave differently when served. They all have the same key and value, so one
token can stand for n of them if log(n) is added to its score: n exp(s) = exp(s + log n).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention

SERVED_LENGTH = 512
"""Tokens of text that `WanPipeline` gives the transformer (`max_sequence_length`)."""


def fold_padding(encoded: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Zero the padding in `encoded` (B, L, D) and append one zero token for the rest of it: (B, L + 1, D)."""
    return F.pad(encoded * attention_mask[..., None], (0, 0, 0, 1))


def attend_to_folded_padding(transformer: WanTransformer3DModel) -> None:
    """Make `transformer` take text from `fold_padding`, and no other, from now on."""
    for block in transformer.blocks:
        block.attn2.set_processor(FoldedPaddingProcessor())


class FoldedPaddingProcessor:
    """`WanAttnProcessor` for cross-attention to text whose last token stands for `SERVED_LENGTH - L` equal ones."""

    # diffusers sets these on every processor.
    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> torch.Tensor:
        query, key, value = (
            projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for projected in (
                attn.norm_q(attn.to_q(hidden_states)),
                attn.norm_k(attn.to_k(encoder_hidden_states)),
                attn.to_v(encoder_hidden_states),
            )
        )
        length = encoder_hidden_states.shape[1] - 1
        query, key = query.to(value.dtype), key.to(value.dtype)
        # Plain products: with so few keys a fused kernel saves nothing, and on CPUs it takes 9 times as long.
        scores = (query * query.shape[-1] ** -0.5) @ key.mT
        scores = scores + F.pad(scores.new_zeros(length), (0, 1), value=math.log(SERVED_LENGTH - length))
        attended = (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](attended))
