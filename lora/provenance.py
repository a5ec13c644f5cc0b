"""Which of an adapter file's tensors a key conversion really used.

Diffusers' converters drop some keys silently and others with a log line. An adapter applied in part is not the adapter
its author made, so the conversion runs on tensors that remember their origin: whatever a converter does (renaming,
splitting a fused QKV, scaling by alpha), every result names the keys that went into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


class Traced(torch.Tensor):
    """A tensor that knows the file keys it was computed from."""

    sources: frozenset[str] = frozenset()
    read: set[str]
    """Keys whose value was read out as a number (alphas), shared by all tensors of one file."""

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], set[str]]:
        """The same tensors, traced, and the set that collects the keys that are read as numbers."""
        read: set[str] = set()
        traced: dict[str, torch.Tensor] = {}
        for key, tensor in tensors.items():
            # A fresh view, so that keys with the same tensor do not share these attributes.
            view = tensor.view_as(tensor).as_subclass(cls)
            view.sources, view.read = frozenset({key}), read
            traced[key] = view
        return traced, read

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Traced)]
        sources = frozenset().union(*(tensor.sources for tensor in inputs))
        result = super().__torch_function__(func, types, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Traced):
                leaf.sources, leaf.read = leaf.sources | sources, inputs[0].read
        if func in (torch.Tensor.item, torch.Tensor.__float__):
            inputs[0].read.update(sources)
        return result


def used_keys(converted: Iterable[torch.Tensor], read: set[str]) -> set[str]:
    """The file keys that went into a conversion's results."""
    return read.union(*(tensor.sources for tensor in converted if isinstance(tensor, Traced)))
