"""A cache of text encodings, so that a repeated text is not encoded again."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils._pytree import tree_leaves, tree_map_only

TEXT_METHODS = ("_get_t5_prompt_embeds", "_get_clip_prompt_embeds")
"""Methods of pipelines that encode each text separately: with a new prompt, the negative one stays cached."""

REMEMBERED_BYTES = 2**26
"""Room for 16 texts of Wan or FLUX.1 (512 tokens of width 4096 in bf16), or for 200 short ones of Z-Image."""


class EncodingMemory:
    """The encodings that a model's pipelines used most recently.

    Nearly all requests share their negative prompt, and people try one prompt with many seeds. With the encoder in host
    memory (`--text-encoder-cpu-offload`), each cached text saves a transfer of the whole encoder.
    """

    def __init__(self, max_bytes: int = REMEMBERED_BYTES):
        self._max_bytes = max_bytes
        self._encodings: OrderedDict[Hashable, Any] = OrderedDict()
        self.num_bytes = 0

    def attach(self, pipeline: DiffusionPipeline) -> None:
        """Make `pipeline` look here before it encodes a text. Encodings of texts with images are not cached."""
        names = [name for name in TEXT_METHODS if hasattr(pipeline, name)] or ["encode_prompt"]
        for name in names:
            if hasattr(pipeline, name):
                setattr(pipeline, name, self._remembering(getattr(pipeline, name), (type(pipeline), name)))

    def _remembering(self, encode: Callable[..., Any], source: Hashable) -> Callable[..., Any]:
        @functools.wraps(encode)
        def encode_or_remember(*args: Any, **kwargs: Any) -> Any:
            arguments = as_key((args, sorted(kwargs.items())))
            if arguments is None:
                return encode(*args, **kwargs)
            key = (source, arguments)
            if key not in self._encodings:
                encoding = encode(*args, **kwargs)
                if num_bytes(encoding) > self._max_bytes:
                    return encoding
                self._encodings[key] = encoding
                self.num_bytes += num_bytes(encoding)
            self._encodings.move_to_end(key)
            encoding = self._encodings[key]
            while self.num_bytes > self._max_bytes:
                self.num_bytes -= num_bytes(self._encodings.popitem(last=False)[1])
            # A copy: a pipeline that edits its encoding in place must not change the cached one.
            return tree_map_only(torch.Tensor, torch.clone, encoding)

        return encode_or_remember


def as_key(value: Any) -> Hashable | None:
    """A key, equal for equal texts and options; None if there is anything else in `value`, an image or a tensor."""
    if isinstance(value, list | tuple):
        parts = [as_key(each) for each in value]
        return None if None in parts else tuple(parts)
    if value is None or isinstance(value, bool | int | float | str | torch.device | torch.dtype):
        return (type(value), value)
    return None


def num_bytes(encoding: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(encoding) if isinstance(leaf, torch.Tensor))
