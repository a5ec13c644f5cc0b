"""Converts every public adapter format's key names to diffusers' (`<module>.lora_A.weight` etc.), by transformer.

Diffusers converts foreign names (each family's `lora_state_dict`). This module does what that leaves open: it finds
keys left unused; it keeps alphas from being rounded to half precision; it reads files in PEFT's and diffusers' own
naming, which diffusers takes for foreign ones when they have alphas; and it renames halves from the names that
diffusers used before PEFT.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from torch import nn

from lora.provenance import Traced, used_keys
from lora.source import InvalidAdapter
from lora.wan import take_full_updates

T = TypeVar("T")

PEFT_PREFIX = "base_model.model."

COMFYUI_PREFIX = "diffusion_model."

ALPHA = re.compile(r"(?P<module>.+?)(\.lora_[AB]\.weight)?\.alpha")

LAYER = re.compile(r"(?P<module>.+)\.lora_(?P<half>A(?!(\.default)?\.bias)|B)(\.default)?\.(?P<kind>weight|bias)")
"""One tensor of one layer: a half of its low-rank pair, or the bias of the second half."""


@dataclass(frozen=True)
class Converted:
    layers: Mapping[str, Mapping[str, torch.Tensor]]
    """Halves of low-rank pairs, by transformer, then by key in diffusers' naming."""
    alphas: Mapping[str, Mapping[str, float]]
    """By transformer, then by module, without the alphas that are already folded into the layers."""
    whole: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Whole-tensor updates of the first transformer by parameter name."""
    renamed: bool = False
    """Whether the file names modules differently from the model."""


def convert(
    tensors: Mapping[str, torch.Tensor], pipeline_class: type, transformers: Mapping[str, nn.Module]
) -> Converted:
    """Rename all tensors of a file.

    Args:
        transformers: by component name; only their configs and the names of their parameters are read.

    Raises:
        InvalidAdapter: the pipeline's family does not know the file's format, or has no use for some key.
    """
    ours = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    parameters = {name: {key for key, _ in module.named_parameters()} for name, module in transformers.items()}
    if any(_names_a_layer(key, parameters) for key in ours):
        return Converted(*_without_alphas(ours, transformers))
    return _by_diffusers(tensors, pipeline_class, transformers)


def by_transformer(values: Mapping[str, T], transformers: Iterable[str]) -> dict[str, dict[str, T]]:
    """Group keys by transformer, for every transformer: the one that their first component names, or else the first."""
    divided: dict[str, dict[str, T]] = {name: {} for name in transformers}
    first = next(iter(divided))
    for key, value in values.items():
        name, _, rest = key.partition(".")
        if name in divided:
            divided[name][rest] = value
        else:
            divided[first][key] = value
    return divided


def _names_a_layer(key: str, parameters: Mapping[str, Collection[str]]) -> bool:
    """Whether a key is already in diffusers' naming: its layer is among `parameters`, which are by transformer."""
    layer = LAYER.fullmatch(key)
    return layer is not None and any(
        f"{layer['module'].removeprefix(f'{name}.')}.weight" in names for name, names in parameters.items()
    )


def _by_diffusers(
    tensors: Mapping[str, torch.Tensor], pipeline_class: type, transformers: Mapping[str, nn.Module]
) -> Converted:
    """Rename keys that are not in diffusers' naming, and make sure that none gets lost."""
    if not hasattr(pipeline_class, "lora_state_dict"):
        raise InvalidAdapter(f"can't be used: {pipeline_class.__name__} takes no LoRA")
    # In fp32, so that folding in an alpha rounds nothing.
    traced, read = Traced.of({key: tensor.float() for key, tensor in tensors.items()})
    whole = take_full_updates(traced) if issubclass(pipeline_class, WanLoraLoaderMixin) else {}
    layers, alphas = _without_alphas(_renamed(traced, pipeline_class, transformers) if traced else {}, transformers)

    used = used_keys([tensor for of_one in (*layers.values(), whole) for tensor in of_one.values()], read)
    unused = [key for key in tensors if key not in used and not _is_neutral(key, tensors)]
    if unused:
        raise InvalidAdapter(f"has {len(unused)} keys that {pipeline_class.__name__} has no use for: {listed(unused)}")
    return Converted(
        {name: {key: _narrowed(t, tensors) for key, t in of_one.items()} for name, of_one in layers.items()},
        alphas,
        {name: _narrowed(tensor, tensors) for name, tensor in whole.items() if tensor.any()},
        renamed=True,
    )


def _renamed(
    traced: dict[str, torch.Tensor], pipeline_class: type, transformers: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """The result of diffusers' conversion: halves of pairs, and the alphas that it has not folded into them."""
    converter = pipeline_class.lora_state_dict  # type: ignore[attr-defined]
    options: dict[str, Any] = {}
    if "return_alphas" in inspect.signature(converter).parameters:
        options["return_alphas"] = True
    if "unet" in transformers:  # SDXL's own checkpoints number its layers differently
        options["unet_config"] = transformers["unet"].config
    try:
        result = converter(dict(traced), **options)  # a copy: some converters empty it
    except Exception as error:  # on a misfit, converters raise anything (KeyError, IndexError, AssertionError …)
        raise InvalidAdapter(
            f"is of no LoRA format that {pipeline_class.__name__} knows (keys such as {listed(traced)})"
        ) from error
    state, alphas = result if isinstance(result, tuple) else (result, None)
    # Diffusers leaves one step to `load_lora_adapter`: renaming halves from the names it used before PEFT.
    state = convert_unet_state_dict_to_peft({**state, **(alphas or {})})
    # FLUX.1's converter removes no prefix but its own.
    return {key.removeprefix(COMFYUI_PREFIX): value for key, value in state.items()}


def _without_alphas(
    state: Mapping[str, Any], transformers: Collection[str]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, float]]]:
    """The tensors that are not alphas, and the alphas by module; both by transformer."""
    layers = {key: value for key, value in state.items() if not ALPHA.fullmatch(key)}
    alphas = {match["module"]: float(value) for key, value in state.items() if (match := ALPHA.fullmatch(key))}
    return by_transformer(layers, transformers), by_transformer(alphas, transformers)


def _is_neutral(key: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether leaving the key out changes nothing: an update by zero, or an alpha that equals its layer's rank."""
    if match := ALPHA.fullmatch(key):
        halves = (tensors.get(f"{match['module']}.{half}.weight") for half in ("lora_down", "lora_A"))
        return any(half is not None and half.shape[0] == tensors[key].item() for half in halves)
    return not tensors[key].any()


def _narrowed(tensor: torch.Tensor, file: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A plain tensor, in the file's half precision if that holds the same values, else as it is."""
    sources = tensor.sources if isinstance(tensor, Traced) else frozenset()
    tensor = tensor.as_subclass(torch.Tensor)
    for dtype in {file[key].dtype for key in sources if file[key].dtype in (torch.bfloat16, torch.float16)}:
        if torch.equal(tensor.to(dtype).float(), tensor):
            return tensor.to(dtype)
    return tensor


def listed(keys: Mapping[str, object] | list[str], limit: int = 3) -> str:
    """The first few keys, for a message."""
    first = list(keys)[:limit]
    return ", ".join(first) + (", …" if len(keys) > limit else "")
