"""Merges adapters into a model's weights in place, and unmerges them bit for bit.

Subtracting what was added does not restore the old weights (after diffusers' `fuse_lora` and `unfuse_lora`, 15 % of
bf16 weights differ). So an unmerge rewrites the touched weights from the base values, wherever `Originals` keeps them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn

from lora.factors import Delta, Factors, LowRank, Update
from lora.originals import HostCopies, Key, Originals

CHUNK = 2**20
"""Weights that one CPU thread merges at a time: 4 MiB in fp32, which fits an L3 cache. 397M bf16 weights take two cores
0.34 s, or 0.37 s in chunks of a quarter of this size."""

Plan = dict[Key, list[tuple[Update, float]]]
"""Every update of every parameter, with its strength."""


class Merger:
    """Keeps a model's weights at base + the composition merged last.

    Modules, parameters and their storage stay the same objects, so hooks, compiled graphs and offloading keep working.
    A parameter is changed on the device it is on: with offloading, merge between jobs, when `parameter.data` is the
    host tensor.
    """

    def __init__(self, transformers: Mapping[str, nn.Module], originals: Originals | None = None):
        """`originals`: where restored weights come from; copies in host memory by default."""
        self._transformers = dict(transformers)
        self._originals = originals or HostCopies()
        self._merged: set[Key] = set()
        """The parameters that are not at their base values."""

    @property
    def holds_a_merge(self) -> bool:
        """Whether any weight is not at its base value."""
        return bool(self._merged)

    @property
    def num_bytes_held(self) -> int:
        """Host memory that base values take: at most one copy of the transformers."""
        return self._originals.num_bytes

    @torch.no_grad()
    def merge(self, composition: Sequence[tuple[Factors, float, tuple[str, ...]]]) -> None:
        """Make the weights base + the sum of all adapters, each given with its strength and its targets.

        A target is `all` or the name of a transformer; names that the model does not have are ignored. Whatever was
        merged before is unmerged. All adapters of a parameter are added at once and in fp32, so that a half-precision
        weight is rounded once.

        Raises:
            ValueError: an adapter does not fit the model; nothing has changed.
            Exception: anything else that went wrong (out of memory, say); the weights are the base weights again,
                unless restoring them failed too (then `holds_a_merge` is true).
        """
        plan = self._plan(composition)
        try:
            self._restore(self._merged - plan.keys())
            on_gpu = any(self._parameter(key).is_cuda for key in plan)
            with _workers(1 if on_gpu else torch.get_num_threads()) as workers:
                for _ in workers.map(self._merge_parameter, plan.keys(), plan.values()):
                    pass  # re-raises what a worker raised
        except BaseException:
            self.restore()
            raise

    def _merge_parameter(self, key: Key, parts: Sequence[tuple[Update, float]]) -> None:
        parameter = self._parameter(key)
        if key in self._merged:
            base = self._originals.read(key)
        else:
            self._originals.keep(key, parameter)
            base = parameter
            self._merged.add(key)
        _write_sum(parameter, base.to(parameter.device), parts)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the base weights, bit for bit. Only what the merge touched is written."""
        self._restore(set(self._merged))

    def release(self) -> None:
        """Restore the base weights, and free the memory that their copies take."""
        self.restore()
        self._originals.forget()

    def _restore(self, keys: Collection[Key]) -> None:
        for key in keys:
            self._parameter(key).copy_(self._originals.read(key))
            self._merged.discard(key)

    def _plan(self, composition: Sequence[tuple[Factors, float, tuple[str, ...]]]) -> Plan:
        """Every update of every parameter with its strength, checked against the model."""
        plan: Plan = {}
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


@contextmanager
def _workers(count: int) -> Iterator[Executor]:
    """Threads that each merge a parameter alone. Threads that share one wait for each other after each chunk: 397M bf16
    weights then took two cores 0.42 to 0.54 s, depending on how soon threads sleep, and take 0.34 s this way."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads // count,)) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)  # MKL has one thread count for all threads


def _write_sum(parameter: torch.Tensor, base: torch.Tensor, parts: Sequence[tuple[Update, float]]) -> None:
    """`parameter = base + Σ strength * update`, all low-rank updates as one product of concatenated factors.

    `base` may be the parameter itself.
    """
    for update, strength in parts:
        if isinstance(update, Delta):
            delta = update.delta.to(parameter.device, torch.float32)
            base = torch.add(base.float(), delta, alpha=strength * update.scale)
    low_rank = [(update, strength * update.scale) for update, strength in parts if isinstance(update, LowRank)]
    if low_rank:
        down = torch.cat([update.down.flatten(1).float() for update, _ in low_rank])  # (Σr, in)
        up = torch.cat([update.up.float() * scale for update, scale in low_rank], dim=1)  # (out, Σr)
        _write_product(parameter.view(len(parameter), -1), base.view(len(parameter), -1), up, down)
    else:
        parameter.copy_(base)


def _write_product(weight: torch.Tensor, base: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
    """`weight = base + up @ down`, summed in fp32 and rounded once: (out, in) = (out, in) + (out, r) @ (r, in).

    GPUs do that inside `addmm`. CPUs without half-precision matrix instructions take 1.0 s for 14M bf16 weights that
    way, but 0.02 s via fp32, a cacheful of rows at a time.
    """
    if weight.is_cuda or weight.dtype == torch.float32:
        torch.addmm(base.to(weight), up.to(weight), down.to(weight), out=weight)
        return
    rows = max(1, CHUNK // weight.shape[1])
    cacheful = torch.empty(min(rows, len(weight)), weight.shape[1])
    for chunk, chunk_base, chunk_up in zip(weight.split(rows), base.split(rows), up.split(rows), strict=True):
        chunk.copy_(cacheful[: len(chunk)].copy_(chunk_base).addmm_(chunk_up, down))
