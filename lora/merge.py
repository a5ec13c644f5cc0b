"""Adding adapters to a model's weights in place, and taking them out again to the last bit.

Subtracting what was added does not give the old weights back (after diffusers' `fuse_lora` and `unfuse_lora` 15 % of
bf16 weights differ), so the originals of what a merge touches are kept and copied back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from lora.factors import Delta, Factors, LowRank, Update

Key = tuple[str, str]
"""Transformer name, parameter name in it."""


class Merger:
    """Keeps a model's weights at base + the composition merged last.

    Modules, parameters and their storage stay the same objects, so hooks, compiled graphs and offloading go on
    working. A parameter is changed where it lies: with offloading call it between jobs, when `parameter.data` is the
    host tensor.
    """

    def __init__(self, transformers: Mapping[str, nn.Module]):
        self._transformers = dict(transformers)
        self._originals: dict[Key, torch.Tensor] = {}
        """Of what is merged now, in host memory (pinned for CUDA): accelerator memory belongs to the generation."""

    @property
    def num_bytes_held(self) -> int:
        """Host memory that the originals take: 0 while nothing is merged."""
        return sum(original.nbytes for original in self._originals.values())

    @torch.no_grad()
    def merge(self, composition: Sequence[tuple[Factors, float, tuple[str, ...]]]) -> None:
        """Make the weights base + the sum of all adapters, each given with its strength and its targets.

        A target is `all` or the name of a transformer; names that the model does not have are ignored. Whatever was
        merged before is taken out. The products are accumulated in fp32 inside `addmm` and all adapters of a
        parameter are added at once, so that a half-precision weight is rounded once: for one bf16 adapter of strength
        1 the result is the correctly rounded `W + up @ down`.

        Raises:
            ValueError: an adapter does not fit the model; nothing has changed.
            Exception: whatever else went wrong (no memory, say); the weights are the base weights again.
        """
        plan = self._plan(composition)
        try:
            self._rewind(keep=plan.keys())
            for key, parts in plan.items():
                parameter = self._parameter(key)
                if key not in self._originals:
                    self._originals[key] = _host_copy(parameter)
                _add(parameter, parts)
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def restore(self) -> None:
        """Make the weights the base weights again, bit for bit. Only what the merge touched is written."""
        self._rewind(keep=())

    def _plan(
        self, composition: Sequence[tuple[Factors, float, tuple[str, ...]]]
    ) -> dict[Key, list[tuple[Update, float]]]:
        """Every update of every parameter with its strength, checked against the model."""
        plan: dict[Key, list[tuple[Update, float]]] = {}
        for factors, strength, target in composition:
            for name, updates in factors.updates.items():
                if strength == 0 or name not in self._transformers or not {"all", name}.intersection(target):
                    continue
                for parameter, update in updates.items():
                    plan.setdefault((name, parameter), []).append((update, strength))
        for key, parts in plan.items():
            shape = self._parameter(key).shape
            for update, _ in parts:
                if update.shape != shape:
                    raise ValueError(f"{'.'.join(key)} is {tuple(shape)}, the adapter is for {tuple(update.shape)}")
        return plan

    def _rewind(self, keep: Collection[Key]) -> None:
        """Copy all originals back; forget those of parameters that are not in `keep`."""
        for key, original in list(self._originals.items()):
            self._parameter(key).copy_(original)
            if key not in keep:
                del self._originals[key]

    def _parameter(self, key: Key) -> torch.Tensor:
        transformer, parameter = key
        try:
            return self._transformers[transformer].get_parameter(parameter).data
        except AttributeError:
            raise ValueError(f"the model has no parameter {transformer}.{parameter}") from None


def _add(parameter: torch.Tensor, parts: Sequence[tuple[Update, float]]) -> None:
    """`parameter += Σ strength * update`, all low-rank updates as one product of concatenated factors."""
    low_rank = [(update, strength * update.scale) for update, strength in parts if isinstance(update, LowRank)]
    for update, strength in parts:
        if isinstance(update, Delta):
            parameter.add_(update.delta.to(parameter), alpha=strength * update.scale)
    if low_rank:
        down = torch.cat([update.down.flatten(1) for update, _ in low_rank])  # (Σr, in)
        up = torch.cat([update.up.float() * scale for update, scale in low_rank], dim=1)  # (out, Σr)
        parameter.view(parameter.shape[0], -1).addmm_(up.to(parameter), down.to(parameter))


def _host_copy(parameter: torch.Tensor) -> torch.Tensor:
    copy = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda)
    return copy.copy_(parameter)
