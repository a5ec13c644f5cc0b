"""`shard_sequence`: make a transformer compute on shards of its token sequences, one shard per rank.

At the edges of each region that `plans` names, hooks split the inputs and gather the outputs. Within a region only
attention needs more than a rank's own tokens, and `dispatch` routes it to `attention`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models._modeling_parallel import ContextParallelInput
from torch import Tensor, nn

from pipelines.parallel.dispatch import attend_over_shards
from pipelines.parallel.mesh import Mesh
from pipelines.parallel.plans import Splits, regions
from pipelines.parallel.shards import ShardedSequence, shard


def shard_sequence(transformer: nn.Module, mesh: Mesh) -> None:
    """Make the ranks of `mesh.sequence` compute each forward of `transformer` together, each on a shard of the tokens.

    Every rank passes the same inputs and gets the same, whole output. Choose an attention backend
    (`transformer.set_attention_backend`) first; a ring uses its own kernels, which return the log-sum-exp. Enable
    caches (`transformer.enable_cache`) first, so that they see shards. Compile
    (`transformer.compile_repeated_blocks(fullgraph=False)`) afterwards. Does nothing if one rank holds all tokens.

    Raises:
        ValueError: there is no plan for this class of transformer, or it is sharded already.
    """
    if mesh.dims.sp_degree == 1:
        return
    for index, region in enumerate(regions(transformer)):
        streams = {*region.attention.values(), (region.output,)}
        sequences = {names: ShardedSequence(mesh, names) for names in streams}
        for pattern, splits in region.splits.items():
            for module in _modules(transformer, pattern):
                _hook(module, Split(module, splits, tuple(sequences.values()), mesh), f"split {index} {pattern}")
        for pattern, gather in region.gathers.items():
            for module in _modules(transformer, pattern):
                _hook(module, Gather(gather.gather_dim, sequences[(region.output,)]), f"gather {index} {pattern}")
        if region.fill_text:
            _hook(transformer, FillText(mesh), f"fill text {index}")
        for pattern, names in region.attention.items():
            for module in _modules(transformer, pattern):
                attend_over_shards(module, sequences[names])


def _modules(transformer: nn.Module, pattern: str) -> list[nn.Module]:
    """The modules whose names match `pattern`, in which `*` stands for one part of a name."""
    expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
    return [module for name, module in transformer.named_modules() if expression.fullmatch(name)]


def _hook(module: nn.Module, hook: ModelHook, name: str) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


class Split(ModelHook):
    """Splits some inputs and outputs of a module, so that this rank computes on its shard of them."""

    def __init__(
        self,
        module: nn.Module,
        splits: Splits,
        sequences: Collection[ShardedSequence],
        mesh: Mesh,
    ):
        super().__init__()
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        self.mesh = mesh
        self.inputs = {name: split for name, split in splits.items() if isinstance(name, str)}
        self.outputs = {index: split for index, split in splits.items() if isinstance(index, int)}
        self.positions = {name: parameters.index(name) for name in self.inputs}
        self.streams = {stream for sequence in sequences for stream in sequence.streams} & self.inputs.keys()
        self.sequences = sequences

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = {
            name: kwargs[name] if name in kwargs else args[position]
            for name, position in self.positions.items()
            if name in kwargs or position < len(args)
        }
        if self.streams:
            totals = {name: values[name].shape[1] for name in self.streams}
            for sequence in self.sequences:
                sequence.begin(totals)
        positional = list(args)
        for name, value in values.items():
            if name in kwargs:
                kwargs[name] = self._shard(value, self.inputs[name])
            else:
                positional[self.positions[name]] = self._shard(value, self.inputs[name])
        return tuple(positional), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if not self.outputs:
            return output
        return tuple(
            self._shard(value, self.outputs[index]) if index in self.outputs else value
            for index, value in enumerate(output)
        )

    def _shard(self, value: Tensor | None, split: ContextParallelInput) -> Tensor | None:
        """This rank's shard of `value`, or `value` itself if it is None or, as a Wan timestep, one for all tokens."""
        if value is None or value.dim() != split.expected_dims:
            return value
        return shard(value, split.split_dim, self.mesh)


class FillText(ModelHook):
    """Pads text that has fewer tokens than ranks with masked tokens, so that no rank's shard is empty."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.ranks = mesh.dims.sp_degree

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        text = kwargs["encoder_hidden_states"]
        missing = self.ranks - text.shape[1]
        if missing > 0:
            mask = kwargs["encoder_hidden_states_mask"]
            if mask is None:
                mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
            kwargs["encoder_hidden_states"] = F.pad(text, (0, 0, 0, missing))
            kwargs["encoder_hidden_states_mask"] = F.pad(mask, (0, missing))
        return args, kwargs


class Gather(ModelHook):
    """Gathers the output of a module from the shards of all ranks."""

    def __init__(self, dim: int, sequence: ShardedSequence):
        super().__init__()
        self.dim = dim
        self.sequence = sequence

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return self.sequence.gather(output, self.dim)
