"""Puts sharded attention behind diffusers' attention dispatcher.

An attention processor passes its `_parallel_config` to the dispatcher, which passes it to the backend in use. Here that
config is a `ShardedSequence`. A backend that gets one computes `sharded_attention`, otherwise the same as before. So
attention without one (cross-attention, text encoders, VAEs, other transformers) stays exactly as it was.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor

from pipelines.parallel.attention import sharded_attention
from pipelines.parallel.shards import ShardedSequence


def attend_over_shards(attention: Attention, sequence: ShardedSequence) -> None:
    """Make one attention module compute this rank's tokens, attending over all of `sequence`."""
    have_dispatched(attention)._parallel_config = sequence
    backend = attention.processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    _teach(AttentionBackendName(backend))


def have_dispatched(attention: Attention) -> Any:
    """The processor of an attention module, first replaced if there is a substitute that calls the dispatcher."""
    if isinstance(attention.processor, JointAttnProcessor2_0):
        attention.set_processor(DispatchedJointProcessor())
    return attention.processor


def _teach(backend: AttentionBackendName) -> None:
    """Re-register a backend, once, so that it handles sharded sequences."""
    registry = _AttentionBackendRegistry
    attend = registry._backends[backend]
    if hasattr(attend, "knows_shards"):
        return
    accepted = registry._supported_arg_names[backend]

    @functools.wraps(attend)
    def attend_maybe_sharded(*, _parallel_config: Any = None, **arguments: Any) -> Tensor:
        if not isinstance(_parallel_config, ShardedSequence):
            if "_parallel_config" in accepted:
                arguments["_parallel_config"] = _parallel_config
            return attend(**arguments)

        def attend_on_this_rank(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return attend(**{**arguments, "query": query, "key": key, "value": value, "attn_mask": mask})

        return sharded_attention(
            arguments["query"],
            arguments["key"],
            arguments["value"],
            arguments.get("attn_mask"),
            arguments.get("scale"),
            _parallel_config,
            attend_on_this_rank,
        )

    attend_maybe_sharded.knows_shards = True  # type: ignore[attr-defined]
    registry._backends[backend] = attend_maybe_sharded
    # The dispatcher drops arguments that a backend does not list, and a dropped `_parallel_config` would go unnoticed.
    registry._supported_arg_names[backend] = accepted | {"_parallel_config"}
    registry._supports_context_parallel.add(backend.value)


class DispatchedJointProcessor:
    """Stable Diffusion 3's attention through the dispatcher; its own processor calls SDPA directly.

    `hidden_states` (B, S_image, C) and, in joint attention, `encoder_hidden_states` (B, S_text, C) attend to
    their concatenation.
    """

    _attention_backend: AttentionBackendName | None = None
    _parallel_config: ShardedSequence | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        heads = (attn.heads, -1)
        query = attn.to_q(hidden_states).unflatten(-1, heads)
        key = attn.to_k(hidden_states).unflatten(-1, heads)
        value = attn.to_v(hidden_states).unflatten(-1, heads)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)

        if encoder_hidden_states is not None:
            text_query = attn.add_q_proj(encoder_hidden_states).unflatten(-1, heads)
            text_key = attn.add_k_proj(encoder_hidden_states).unflatten(-1, heads)
            text_value = attn.add_v_proj(encoder_hidden_states).unflatten(-1, heads)
            if attn.norm_added_q is not None:
                text_query, text_key = attn.norm_added_q(text_query), attn.norm_added_k(text_key)
            query = torch.cat([query, text_query], dim=1)
            key = torch.cat([key, text_key], dim=1)
            value = torch.cat([value, text_value], dim=1)

        attended = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        ).flatten(2)

        image, text = attended.tensor_split([hidden_states.shape[1]], dim=1)
        to_out, dropout = attn.to_out
        image = dropout(to_out(image))
        if encoder_hidden_states is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)
