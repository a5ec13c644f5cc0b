"""Whole-tensor updates in LoRA files for Wan, named as in Wan's own checkpoints.

Distillation LoRAs (lightx2v, CausVid, AccVideo and those that ComfyUI's tools extract) carry `diff`, `diff_b` and
`diff_m` beside the low-rank pairs: full updates of norms, biases, modulations and the patch embedding. Diffusers' LoRA
converter drops most of them and fails on the others. Each is named like the checkpoint tensor that it changes, so the
checkpoint converter can rename it.
"""

from __future__ import annotations

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

PREFIX = "diffusion_model."

ENDINGS = {".modulation.diff": ".modulation", ".diff": ".weight", ".diff_b": ".bias", ".diff_m": ".modulation"}
"""Endings of an update and of the tensor that it changes, as LightX2V's `tools/extract/lora_extractor.py` pairs them.
The first comes from tools that do not strip the parameter's name."""


def take_full_updates(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the whole-tensor updates from a file's tensors and return them by diffusers' parameter names."""
    checkpoint: dict[str, torch.Tensor] = {}
    for key in list(tensors):
        ending = next((ending for ending in ENDINGS if key.endswith(ending)), None)
        if key.startswith(PREFIX) and ending is not None:
            name = key.removeprefix(PREFIX).removesuffix(ending) + ENDINGS[ending]
            checkpoint[name] = tensors.pop(key)
    return convert_wan_transformer_to_diffusers(checkpoint)
