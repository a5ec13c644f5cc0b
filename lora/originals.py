"""Where base weights come from when adapters are unmerged.

There are two sources, and the choice (`lora_restore`) depends on memory: copies in host memory, or the files that the
model was loaded from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn

Key = tuple[str, str]
"""Transformer name, parameter name in it."""


class Originals(Protocol):
    """The base values of a model's parameters."""

    @property
    def num_bytes(self) -> int:
        """Host memory that they take."""

    def keep(self, key: Key, parameter: torch.Tensor) -> None:
        """Called before `parameter` is changed, while it still has its base values."""

    def read(self, key: Key) -> torch.Tensor:
        """The base values of a parameter that was kept, in host memory and in its precision. Do not write to them."""

    def forget(self) -> None:
        """Called when every parameter has its base values again. None is read before it is kept again."""


class HostCopies:
    """Copies of every parameter ever merged into, in host memory (pinned for CUDA): accelerator memory is for
    generation. They outlive the merge, because copying is half of a merge's time."""

    def __init__(self) -> None:
        self._copies: dict[Key, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies.values())

    def keep(self, key: Key, parameter: torch.Tensor) -> None:
        if key not in self._copies:
            copy = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda)
            self._copies[key] = copy.copy_(parameter)

    def read(self, key: Key) -> torch.Tensor:
        return self._copies[key]

    def forget(self) -> None:
        self._copies.clear()


class Checkpoint:
    """The safetensors files that the transformers were loaded from, memory-mapped, which costs no memory.

    The files stay open, so replacing or deleting them while the server runs changes nothing.
    """

    num_bytes = 0

    def __init__(self, transformers: Mapping[str, nn.Module], directory: Path):
        """Find every parameter in the checkpoint and compare it with what was loaded, bit for bit.

        Args:
            transformers: at their base values, by component name.
            directory: the model's, with one folder per component.

        Raises:
            ValueError: a parameter can't be restored from there, because the loader renamed it, computed it or put it
                together from several. The message is one line.
        """
        self._files: dict[Key, Any] = {}
        self._dtypes: dict[Key, torch.dtype] = {}
        for name, transformer in transformers.items():
            files = _files_by_tensor(directory / name)
            for parameter_name, parameter in transformer.named_parameters():
                key = (name, parameter_name)
                if parameter_name not in files:
                    raise ValueError(f"{_refusal(key)}: '{directory / name}' has no tensor of this name")
                self._files[key] = files[parameter_name]
                self._dtypes[key] = parameter.dtype
                if not _same_bits(self.read(key), parameter.detach().cpu()):
                    raise ValueError(f"{_refusal(key)}: in '{directory / name}' it has other values")

    def keep(self, key: Key, parameter: torch.Tensor) -> None:
        pass

    def read(self, key: Key) -> torch.Tensor:
        return self._files[key].get_tensor(key[1]).to(self._dtypes[key])

    def forget(self) -> None:
        pass


def _files_by_tensor(folder: Path) -> dict[str, Any]:
    """The open safetensors file of each tensor in a component's folder, which may have one file or several."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    shards = json.loads(index.read_text())["weight_map"].values() if index.is_file() else [SAFETENSORS_WEIGHTS_NAME]
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"Weights can't be restored from the checkpoint: '{folder}' has no {missing[0]}")
    files = [safe_open(folder / name, framework="pt") for name in sorted(set(shards))]
    return {tensor: file for file in files for tensor in file.keys()}  # noqa: SIM118 (not a mapping)


def _refusal(key: Key) -> str:
    return f"{'.'.join(key)} can't be restored from the checkpoint"


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether shapes and all bits are equal: 0.0 and -0.0 differ."""
    return one.shape == other.shape and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))
