"""Adapters as other programs make them: trained (here: filled at random) and saved by PEFT, then renamed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import nn

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Trained:
    """What PEFT has after training."""

    state: State
    """`<module>.lora_A.weight` and the like."""
    config: LoraConfig
    fused: State
    """All parameters of the model after PEFT itself merged the adapter."""
    peft_model: nn.Module

    def alpha(self, module: str) -> float:
        pattern = self.config.alpha_pattern or {}
        return pattern.get(get_pattern_key(pattern.keys(), module), self.config.lora_alpha)


def train(
    transformer: nn.Module,
    target_modules: list[str] | str,
    *,
    r: int = 4,
    lora_alpha: float = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Trained:
    """A PEFT adapter for some modules of a copy of `transformer`, each tensor filled with small random values."""
    adapter = LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules, **config)  # type: ignore[arg-type]
    model = get_peft_model(deepcopy(transformer), adapter)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.copy_(noise.to(dtype))  # representable in dtype, so that saving in it loses nothing
    state = {
        key.removeprefix("base_model.model."): value.detach().clone().to(dtype)
        for key, value in get_peft_model_state_dict(model).items()
    }
    fused = {k: v.clone() for k, v in deepcopy(model).merge_and_unload().state_dict().items()}
    return Trained(state, adapter, fused, model)


def modules_of(state: State) -> list[str]:
    return sorted({key.partition(".lora_")[0] for key in state})


def with_prefix(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def kohya_halves(state: State) -> State:
    """`lora_A` and `lora_B` as `lora_down` and `lora_up`."""
    return {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v for k, v in state.items()}


def with_alphas(trained: Trained, state: State, name: Callable[[str], str]) -> State:
    """Add an `.alpha` for every module, under the module's name in the foreign format."""
    alphas = {
        f"{name(module)}.alpha": torch.tensor(float(trained.alpha(module))) for module in modules_of(trained.state)
    }
    return {**state, **alphas}


def renamed(state: State, name: Callable[[str], str]) -> State:
    """Rename the modules, keep what follows."""
    return {name(key.partition(".lora_")[0]) + ".lora_" + key.partition(".lora_")[2]: v for key, v in state.items()}


WAN_ORIGINAL_NAMES = {
    r"attn1\.to_out\.0": "self_attn.o",
    r"attn1\.to_(.)": r"self_attn.\1",
    r"attn2\.to_out\.0": "cross_attn.o",
    r"attn2\.to_(.)": r"cross_attn.\1",
    r"attn2\.add_(.)_proj": r"cross_attn.\1_img",
    r"ffn\.net\.0\.proj": "ffn.0",
    r"ffn\.net\.2": "ffn.2",
    r"^proj_out": "head.head",
    r"condition_embedder\.time_proj": "time_projection.1",
    r"condition_embedder\.(text|time)_embedder\.linear_1": r"\1_embedding.0",
    r"condition_embedder\.(text|time)_embedder\.linear_2": r"\1_embedding.2",
}


def wan_original(module: str) -> str:
    """A module's name in Wan's own checkpoints."""
    for pattern, replacement in WAN_ORIGINAL_NAMES.items():
        module = re.sub(pattern, replacement, module)
    return module


def musubi(prefix: str = "lora_unet_", name: Callable[[str], str] = lambda module: module) -> Callable[[str], str]:
    """A module's name as kohya's trainers flatten it."""
    return lambda module: prefix + name(module).replace(".", "_")


def save(tensors: Mapping[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file, metadata)
    return file
