"""From an adapter file in any public format to factors that are known to fit the model, or one clear reason why not.

What diffusers only warns about (unused keys, layers that the model does not have, an adapter for another model) is an
error here, found before a weight is touched.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import nn

from lora.convert import ALPHA, LAYER, by_transformer, convert, listed
from lora.factors import DTYPES, Delta, Factors, LowRank, Update
from lora.source import InvalidAdapter, Source, resolve
from lora.wan import ENDINGS

__all__ = ["Factors", "InvalidAdapter", "Source", "load", "resolve"]

Config = Mapping[str, Any]
"""Fields of PEFT's `LoraConfig`."""

OTHER_METHODS = {
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
}
"""Parts of keys that reveal an adapter other than plain LoRA."""

BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Prefixes of PEFT's `init_lora_weights` that subtract the adapter's initial values from the model's weights."""


def load(source: Source, pipeline_class: type, transformers: Mapping[str, nn.Module]) -> Factors:
    """Read, convert and validate an adapter for the transformers of a pipeline.

    A file that updates the first transformer alone applies to all of the model's (both experts of Wan 2.2). The factors
    keep the file's precision, but become fp32 where an alpha that was folded into them needs it, or from fp8 and fp64.

    Args:
        source: what `resolve` found.
        pipeline_class: the diffusers pipeline, whose `lora_state_dict` knows the family's formats.
        transformers: by component name; only their configs and the names and shapes of their parameters are read.

    Raises:
        InvalidAdapter: with one reason that a client can act on.
    """
    shapes = {name: {p: v.shape for p, v in module.named_parameters()} for name, module in transformers.items()}
    first = next(iter(shapes))
    try:
        tensors, configs = _read(source, shapes)
        _demand_lora(tensors, configs.values())
        if any(ALPHA.fullmatch(key) for key in tensors):  # a config would scale again what these alphas scale
            configs = {name: {} for name in shapes}
        converted = convert(tensors, pipeline_class, transformers)
        if converted.renamed and any(config.get("alpha_pattern") for config in configs.values()):
            raise InvalidAdapter("has a config with alphas by module, under names that this model does not have")
        updates = {
            name: _updates(converted.layers[name], converted.alphas[name], configs[name], shapes[name])
            for name in shapes
        }
        updates[first] |= _whole(converted.whole, updates[first], shapes[first])
    except InvalidAdapter as error:
        raise InvalidAdapter(f"LoRA '{source.path}' {error}") from error.__cause__
    updates = {name: of_transformer for name, of_transformer in updates.items() if of_transformer}
    if updates.keys() == {first}:
        updates = dict.fromkeys(shapes, updates[first])
    return Factors(updates)


def _read(source: Source, transformers: Iterable[str]) -> tuple[dict[str, torch.Tensor], Mapping[str, Config]]:
    """All tensors of the file, and PEFT's config for each transformer: its own from the file's header (diffusers), or
    one for all from beside the file."""
    try:
        with safe_open(source.file, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        truncated = "is truncated" if "not fully covered" in reason else "can't be read as safetensors"
        raise InvalidAdapter(f"{truncated} ({reason})") from error
    try:
        if LORA_ADAPTER_METADATA_KEY in header:
            return tensors, by_transformer(json.loads(header[LORA_ADAPTER_METADATA_KEY]), transformers)
        return tensors, dict.fromkeys(transformers, json.loads(source.config.read_text()) if source.config else {})
    except ValueError as error:
        raise InvalidAdapter(f"has a config that is no JSON ({error})") from error


def _demand_lora(tensors: Mapping[str, torch.Tensor], configs: Iterable[Config]) -> None:
    """Refuse anything but a plain LoRA of the transformer, judging by key names, values and configs alone."""
    methods = [method for mark, method in OTHER_METHODS.items() if any(mark in key for key in tensors)]
    for config in configs:
        methods += ["DoRA"] if config.get("use_dora") else []
        methods += [config["peft_type"]] if config.get("peft_type", "LORA") != "LORA" else []
        if str(config.get("init_lora_weights")).lower().startswith(BASE_CHANGING):
            raise InvalidAdapter(
                f"was trained on weights that {config['init_lora_weights']} had changed, not on the model's; PEFT's "
                "path_initial_model_for_weight_conversion saves it for those"
            )
    if methods:
        raise InvalidAdapter(f"is a {methods[0]} adapter; only plain LoRA is supported")
    if not any("lora" in key or key.endswith(tuple(ENDINGS)) for key in tensors):
        raise InvalidAdapter(f"is not a LoRA: no key names a LoRA layer ({listed(tensors)})")
    text_encoder = [key for key in tensors if key.startswith(("lora_te", "text_encoder"))]
    if text_encoder:
        raise InvalidAdapter(
            f"also changes the text encoder ({len(text_encoder)} of {len(tensors)} keys: {listed(text_encoder)}), "
            "which is not supported: save it without those keys"
        )
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        raise InvalidAdapter(f"has NaN or infinite values in {listed(broken)}")


def _updates(
    layers: Mapping[str, torch.Tensor],
    alphas: Mapping[str, float],
    config: Config,
    shapes: Mapping[str, torch.Size],
) -> dict[str, Update]:
    """The updates of one transformer by parameter name. Raises `InvalidAdapter` unless every layer fits."""
    _demand_known(layers, shapes)
    modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in layers.items():
        layer = LAYER.fullmatch(key)
        assert layer is not None
        modules[layer["module"]][f"{layer['half']}.{layer['kind']}"] = _storable(tensor)
    lonely = [module for module in alphas if module not in modules]
    if lonely:
        raise InvalidAdapter(f"has alphas without layers: {listed(lonely)}")
    updates: dict[str, Update] = {}
    for module, parts in modules.items():
        if not {"A.weight", "B.weight"} <= parts.keys():
            raise InvalidAdapter(f"is incomplete: {module} has only lora_{' and lora_'.join(sorted(parts))}")
        down, up = parts["A.weight"], parts["B.weight"].flatten(1)
        scale = _scale(module, down.shape[0], alphas, config)
        updates[f"{module}.weight"] = LowRank(down, up, scale)
        if "B.bias" in parts:
            updates[f"{module}.bias"] = Delta(parts["B.bias"], scale)
    _demand_fit(updates, shapes)
    return updates


def _whole(
    deltas: Mapping[str, torch.Tensor], updates: Mapping[str, Update], shapes: Mapping[str, torch.Size]
) -> dict[str, Update]:
    twice = [name for name in deltas if name in updates]
    if twice:
        raise InvalidAdapter(f"gives {listed(twice)} both a low-rank and a whole update")
    whole: dict[str, Update] = {name: Delta(_storable(delta)) for name, delta in deltas.items()}
    _demand_fit(whole, shapes)
    return whole


def _scale(module: str, rank: int, alphas: Mapping[str, float], config: Config) -> float:
    """alpha / rank, by the rules of `peft.tuners.lora.model.LoraModel._create_and_replace`; 1 without an alpha."""
    alpha = alphas.get(module)
    if alpha is None and "lora_alpha" in config:
        pattern = config.get("alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(pattern.keys(), module), config["lora_alpha"])
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _demand_known(layers: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Every key must name a tensor of a LoRA layer, for a module that the transformer has."""
    unknown = [key for key in layers if not ((m := LAYER.fullmatch(key)) and f"{m['module']}.weight" in shapes)]
    if not unknown:
        return
    if len(unknown) == len(layers):
        raise InvalidAdapter(f"is for another model: no layer matches this one ({listed(unknown)})")
    kinds = {_any_block(name) for name in shapes}
    if all((m := LAYER.fullmatch(key)) and _any_block(f"{m['module']}.weight") in kinds for key in unknown):
        raise InvalidAdapter(
            f"is for a deeper model: {len(unknown)} of {len(layers)} keys name blocks that this one has not "
            f"({listed(unknown)})"
        )
    raise InvalidAdapter(
        f"matches only in part: {len(unknown)} of {len(layers)} keys match no layer ({listed(unknown)})"
    )


def _demand_fit(updates: Mapping[str, Update], shapes: Mapping[str, torch.Size]) -> None:
    """Every update must have its parameter's shape."""
    for name, update in updates.items():
        if isinstance(update, LowRank) and update.down.shape[0] != update.up.shape[1]:
            raise InvalidAdapter(
                f"is inconsistent: the halves of {name} have rank {update.down.shape[0]} and {update.up.shape[1]}"
            )
        if name not in shapes:
            raise InvalidAdapter(f"changes {name}, which this model does not have")
        if update.shape != shapes[name]:
            raise InvalidAdapter(
                f"is for a model of another width: {name} is {_by(shapes[name])} here, {_by(update.shape)} in the LoRA"
            )


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a precision that factors support: others (fp8, fp64) become fp32."""
    return tensor if tensor.dtype in DTYPES.values() else tensor.float()


def _any_block(name: str) -> str:
    """A parameter's name without the numbers of its blocks."""
    return re.sub(r"\b\d+\b", "*", name)


def _by(shape: torch.Size) -> str:
    return "x".join(str(size) for size in shape)
