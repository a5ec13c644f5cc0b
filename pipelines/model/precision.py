"""Where a rank computes, and in which precision."""

from __future__ import annotations

import torch

from configs.server_args import Device, Dtype

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

NATIVE_BF16 = ("amx_bf16", "avx512_bf16")
"""CPU features that multiply bf16 in hardware. Without any of them bf16 is emulated, slower than fp32."""

FULL_PRECISION_VAES = ("AutoencoderKLWan",)
"""VAE classes that should decode in fp32, as in diffusers' Wan examples; SGLang Diffusion does so with any VAE."""


def resolve_device(device: Device) -> torch.device:
    """`auto` picks CUDA if it is available. Each rank sees one GPU, so it is always the first.

    Raises:
        ValueError: CUDA is requested but not available.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError("device cuda: no CUDA device is available here")
    return torch.device("cuda:0") if available and device != "cpu" else torch.device("cpu")


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on GPUs and CPUs that multiply it natively, fp32 on others (GPUs before Ampere emulate it)."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(capabilities.get(name) for name in NATIVE_BF16) else torch.float32


def resolve_vae_dtype(dtype: Dtype, device: torch.device, class_name: str | None) -> torch.dtype:
    """Like `resolve_dtype`, except that on CUDA `auto` is fp32 for the VAEs that should decode in it.

    Not on CPUs, where it would cost most of what bf16 gains: 6.6 s instead of 2.6 s for a video on two cores with AMX.
    """
    if dtype == "auto" and device.type == "cuda" and class_name in FULL_PRECISION_VAES:
        return torch.float32
    return resolve_dtype(dtype, device)


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)
