"""Where each transformer's token sequences are split into shards and gathered again.

Four families come with a plan (diffusers' `_cp_plan`); Z-Image and Stable Diffusion 3 have theirs here. Beside each
plan is what diffusers does not say and sharded attention must know: which attention modules see which token streams, in
which order. A `_cp_plan` alone is not enough to include a family: LTX-Video's, for example, also shards the text that
its cross-attention reads.

Names of modules are patterns, in which `*` stands for one part of the name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.modeling_utils import ModelMixin

Streams = tuple[str, ...]
"""Token streams, named by the parameters that carry them, in the order in which attention concatenates them."""
Splits = Mapping[str | int, ContextParallelInput]
"""The inputs (by parameter name) and outputs (by index) of a module that are split, and how."""
TEXT, IMAGE = "encoder_hidden_states", "hidden_states"


@dataclass(frozen=True)
class Region:
    """A part of a transformer that computes on shards."""

    splits: Mapping[str, Splits]
    """By module: what is split."""
    gathers: Mapping[str, ContextParallelOutput]
    """By module: the dimension along which its output is gathered."""
    attention: Mapping[str, Streams]
    """The attention modules within. All others see whole sequences."""
    output: str
    """The stream that is gathered."""
    fill_text: bool = False
    """Whether text with fewer tokens than ranks must be padded: the transformer cannot compute on an empty shard."""

    @classmethod
    def from_diffusers(cls, transformer: ModelMixin, attention: Mapping[str, Streams]) -> Region:
        """The region that the class's own `_cp_plan` describes."""
        plan = transformer._cp_plan
        return cls(
            splits={name: entry for name, entry in plan.items() if isinstance(entry, dict)},
            gathers={name: entry for name, entry in plan.items() if not isinstance(entry, dict)},
            attention=attention,
            output=IMAGE,
        )


def shardable(transformer_class: type[ModelMixin]) -> bool:
    """Whether `regions` knows transformers of this class."""
    return transformer_class.__name__ in _REGIONS


def regions(transformer: ModelMixin) -> tuple[Region, ...]:
    """The parts of `transformer` that compute on shards.

    Raises:
        ValueError: there is no plan for its class.
    """
    name = type(transformer).__name__
    if name not in _REGIONS:
        raise ValueError(
            f"{name} cannot be sharded over several ranks; serve it on one. "
            f"Sharding is known for {', '.join(sorted(_REGIONS))}."
        )
    return _REGIONS[name](transformer)


def _wan(transformer: ModelMixin) -> tuple[Region, ...]:
    return (Region.from_diffusers(transformer, {"blocks.*.attn1": (IMAGE,)}),)


def _flux(transformer: ModelMixin) -> tuple[Region, ...]:
    joint = (TEXT, IMAGE)
    attention = {"transformer_blocks.*.attn": joint, "single_transformer_blocks.*.attn": joint}
    return (Region.from_diffusers(transformer, attention),)


def _qwen_image(transformer: ModelMixin) -> tuple[Region, ...]:
    """Its rotary text embedding reshapes by a size that is ambiguous for zero tokens. An empty prompt has 6."""
    return (replace(Region.from_diffusers(transformer, {"transformer_blocks.*.attn": (TEXT, IMAGE)}), fill_text=True),)


_TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
_GATHER = ContextParallelOutput(gather_dim=1, expected_dims=3)


def _sd3(transformer: ModelMixin) -> tuple[Region, ...]:
    """The dual-attention layers of SD 3.5 have an `attn2` over the image alone."""
    return (
        Region(
            splits={"transformer_blocks.0": {IMAGE: _TOKENS, TEXT: _TOKENS}},
            gathers={"proj_out": _GATHER},
            attention={"transformer_blocks.*.attn": (IMAGE, TEXT), "transformer_blocks.*.attn2": (IMAGE,)},
            output=IMAGE,
        ),
    )


def _z_image(transformer: ModelMixin) -> tuple[Region, ...]:
    """Two regions: the image refiner, then the layers over image and caption.

    The caption refiner (two layers over at most 512 tokens) runs whole on every rank.
    """
    in_each_layer: Splits = {"attn_mask": ContextParallelInput(split_dim=1, expected_dims=2), "freqs_cis": _TOKENS}
    refiner = Region(
        splits={"noise_refiner.0": {"x": _TOKENS}, "noise_refiner.*": in_each_layer},
        gathers={f"noise_refiner.{len(transformer.noise_refiner) - 1}": _GATHER},
        attention={"noise_refiner.*.attention": ("x",)},
        output="x",
    )
    layers = Region(
        splits={"layers.0": {"x": _TOKENS}, "layers.*": in_each_layer},
        gathers={"all_final_layer.*": _GATHER},
        attention={"layers.*.attention": ("x",)},
        output="x",
    )
    return refiner, layers


_REGIONS: Mapping[str, Callable[[ModelMixin], tuple[Region, ...]]] = {
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux,
    "QwenImageTransformer2DModel": _qwen_image,
    "SD3Transformer2DModel": _sd3,
    "WanTransformer3DModel": _wan,
    "ZImageTransformer2DModel": _z_image,
}
