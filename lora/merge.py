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

CHUNK = 2**17
"""Weights that a CPU merges at a time: 512 KiB in fp32, which fits the second-level cache."""


class Merger:
    """Keeps a model's weights at base + the composition merged last.

    Modules, parameters and their storage stay the same objects, so hooks, compiled graphs and offloading go on
    working. A parameter is changed where it lies: with offloading call it between jobs, when `parameter.data` is the
    host tensor.
    """

    def __init__(self, transformers: Mapping[str, nn.Module]):
        self._transformers = dict(transformers)
        self._originals: dict[Key, torch.Tensor] = {}
        """Base values of every parameter that was ever merged into, in host memory (pinned for CUDA): accelerator
        memory belongs to the generation. Kept when they are restored, because saving them is half of a merge's time."""
        self._merged: set[Key] = set()
        """The parameters that are not at their base values."""

    @property
    def num_bytes_held(self) -> int:
        """Host memory that the originals take: at most one copy of the transformers."""
        return sum(original.nbytes for original in self._originals.values())

    @torch.no_grad()
    def merge(self, composition: Sequence[tuple[Factors, float, tuple[str, ...]]]) -> None:
        """Make the weights base + the sum of all adapters, each given with its strength and its targets.

        A target is `all` or the name of a transformer; names that the model does not have are ignored. Whatever was
        merged before is taken out. All adapters of a parameter are added at once and in fp32, so that a half-precision
        weight is rounded once.

        Raises:
            ValueError: an adapter does not fit the model; nothing has changed.
            Exception: whatever else went wrong (no memory, say); the weights are the base weights again.
        """
        plan = self._plan(composition)
        try:
            self._restore(self._merged - plan.keys())
            for key, parts in plan.items():
                parameter = self._parameter(key)
                if key not in self._originals:
                    self._originals[key] = _host_copy(parameter)
                self._merged.add(key)
                _write_sum(parameter, self._originals[key], parts)
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def restore(self) -> None:
        """Make the weights the base weights again, bit for bit. Only what the merge touched is written."""
        self._restore(set(self._merged))

    def release(self) -> None:
        """Restore, and give back the memory that the originals take."""
        self.restore()
        self._originals.clear()

    def _restore(self, keys: Collection[Key]) -> None:
        for key in keys:
            self._parameter(key).copy_(self._originals[key])
            self._merged.discard(key)

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

    def _parameter(self, key: Key) -> torch.Tensor:
        transformer, parameter = key
        try:
            return self._transformers[transformer].get_parameter(parameter).data
        except AttributeError:
            raise ValueError(f"the model has no parameter {transformer}.{parameter}") from None


def _write_sum(parameter: torch.Tensor, original: torch.Tensor, parts: Sequence[tuple[Update, float]]) -> None:
    """`parameter = original + Σ strength * update`, all low-rank updates as one product of concatenated factors."""
    base = original.to(parameter.device)
    for update, strength in parts:
        if isinstance(update, Delta):
            base = torch.add(base, update.delta.to(parameter), alpha=strength * update.scale, out=parameter)
    low_rank = [(update, strength * update.scale) for update, strength in parts if isinstance(update, LowRank)]
    if low_rank:
        down = torch.cat([update.down.flatten(1).float() for update, _ in low_rank])  # (Σr, in)
        up = torch.cat([update.up.float() * scale for update, scale in low_rank], dim=1)  # (out, Σr)
        _write_product(parameter.view(len(parameter), -1), base.view(len(parameter), -1), up, down)


def _write_product(weight: torch.Tensor, base: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
    """`weight = base + up @ down`, summed in fp32 and rounded once: (out, in) = (out, in) + (out, r) @ (r, in).

    GPUs do that inside `addmm`. CPUs without matrix instructions for half precision need 1.0 s for 14M bf16 weights
    that way, and 0.04 s by way of fp32, a cacheful of rows at a time.
    """
    if weight.is_cuda or weight.dtype == torch.float32:
        torch.addmm(base, up.to(weight), down.to(weight), out=weight)
        return
    rows = max(1, CHUNK // weight.shape[1])
    for chunk, chunk_base, chunk_up in zip(weight.split(rows), base.split(rows), up.split(rows), strict=True):
        chunk.copy_(chunk_base.float().addmm_(chunk_up, down))


def _host_copy(parameter: torch.Tensor) -> torch.Tensor:
    copy = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda)
    return copy.copy_(parameter)
