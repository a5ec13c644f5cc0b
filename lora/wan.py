"""Whole-tensor updates in LoRA files for Wan, named as in Wan's own checkpoints.

Distillation LoRAs (lightx2v, CausVid, AccVideo and what is extracted by ComfyUI's tools) carry `diff` and `diff_b`
beside the low-rank pairs: full updates of norms, biases, modulations and the patch embedding. Diffusers' converter
drops most of them. Each is named like the checkpoint tensor that it changes, so the checkpoint's converter names it.
"""

from __future__ import annotations

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

PREFIX = "diffusion_model."


def take_full_updates(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the whole-tensor updates from a file's tensors and return them by diffusers' parameter names."""
    checkpoint: dict[str, torch.Tensor] = {}
    for key in list(tensors):
        if key.startswith(PREFIX) and key.endswith((".diff", ".diff_b")):
            module, _, kind = key.removeprefix(PREFIX).rpartition(".")
            suffix = "" if module.endswith("modulation") else {"diff": ".weight", "diff_b": ".bias"}[kind]
            checkpoint[module + suffix] = tensors.pop(key)
    return convert_wan_transformer_to_diffusers(checkpoint)
