"""What an adapter adds to a model's parameters, and its form as one block of bytes.

The block is a safetensors file in memory, so that ranks can view an adapter in shared memory instead of copying it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import save

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class LowRank:
    """`parameter += scale * up @ down`."""

    down: torch.Tensor
    """(r, in), or (r, in, *kernel) for a convolution; PEFT calls it `lora_A`."""
    up: torch.Tensor
    """(out, r); PEFT calls it `lora_B`."""
    scale: float
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter that it updates."""
        return torch.Size((self.up.shape[0], *self.down.shape[1:]))


@dataclass(frozen=True)
class Delta:
    """`parameter += scale * delta`: for biases and norms, where low rank would save nothing."""

    delta: torch.Tensor
    """Has the parameter's shape."""
    scale: float = 1.0

    @property
    def shape(self) -> torch.Size:
        return self.delta.shape


Update = LowRank | Delta


@dataclass(frozen=True)
class Factors:
    """An adapter that is known to fit a model."""

    updates: Mapping[str, Mapping[str, Update]]
    """By transformer (`transformer`, `transformer_2`), then by parameter name. Transformers with the same updates share
    one mapping."""

    @property
    def transformers(self) -> tuple[str, ...]:
        return tuple(self.updates)

    @property
    def rank(self) -> int:
        """The largest rank among its layers; 0 without low-rank updates."""
        return max((u.down.shape[0] for us in self._groups for u in us.values() if isinstance(u, LowRank)), default=0)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(t.nbytes for us in self._groups for u in us.values() for t in _tensors(u).values())

    @property
    def _groups(self) -> list[Mapping[str, Update]]:
        return list({id(updates): updates for updates in self.updates.values()}.values())

    def to_bytes(self) -> bytes:
        """One safetensors block, which stores tensors that transformers share only once."""
        groups = self._groups
        tensors = {
            f"{index}/{parameter}/{part}": tensor.contiguous()
            for index, updates in enumerate(groups)
            for parameter, update in updates.items()
            for part, tensor in _tensors(update).items()
        }
        group_of = {name: next(i for i, g in enumerate(groups) if g is us) for name, us in self.updates.items()}
        scales = [{parameter: update.scale for parameter, update in updates.items()} for updates in groups]
        return save(tensors, {"group_of": json.dumps(group_of), "scales": json.dumps(scales)})

    @classmethod
    def from_bytes(cls, block: bytes | bytearray | memoryview) -> Factors:
        """The inverse of `to_bytes`. The tensors are views that keep `block` alive; do not write to them."""
        size = int.from_bytes(block[:8], "little")
        header = json.loads(bytes(block[8 : 8 + size]))
        metadata = header.pop("__metadata__")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            tensors = {name: _view(block, 8 + size, entry) for name, entry in header.items()}
        groups = [
            {parameter: _update(tensors, f"{index}/{parameter}", scale) for parameter, scale in scales.items()}
            for index, scales in enumerate(json.loads(metadata["scales"]))
        ]
        return cls({name: groups[index] for name, index in json.loads(metadata["group_of"]).items()})


def _tensors(update: Update) -> dict[str, torch.Tensor]:
    return {"delta": update.delta} if isinstance(update, Delta) else {"down": update.down, "up": update.up}


def _update(tensors: Mapping[str, torch.Tensor], prefix: str, scale: float) -> Update:
    if f"{prefix}/delta" in tensors:
        return Delta(tensors[f"{prefix}/delta"], scale)
    return LowRank(tensors[f"{prefix}/down"], tensors[f"{prefix}/up"], scale)


def _view(block: bytes | bytearray | memoryview, start: int, entry: Mapping) -> torch.Tensor:
    dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
    count = (end - begin) // dtype.itemsize
    return torch.frombuffer(block, dtype=dtype, count=count, offset=start + begin).reshape(entry["shape"])
