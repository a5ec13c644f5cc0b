"""Components that live in host memory and come to the GPU only while they are used."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from configs.server_args import ServerArgs

logger = logging.getLogger(__name__)

VAE_ENTRY_POINTS = ("encode", "decode")
"""Pipelines call these of a VAE, never its `forward`."""

ENCODERS = ("text_encoder", "image_encoder")
"""How the names of the encoders of prompts begin."""


class HostResident:
    """A module whose tensors rest in host memory and point at copies on the device while it is used.

    Nothing is copied back: what runs must not change weights. What edits a resting weight in place (a LoRA merge)
    edits the host tensor, and the next run sees it.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, pin: bool):
        """Bring the module's tensors to host memory, page-locked with `pin`: copies from there are several times
        faster and do not hold up the host."""
        self.execution_device = device
        """Where the module's inputs belong. Pipelines look for it here, at the module's `_hf_hook` (accelerate)."""
        self.module = module
        self._resting: list[tuple[torch.Tensor, torch.Tensor]] = []
        for tensor in self._tensors():
            host = tensor.data.cpu()
            tensor.data = host.pin_memory() if pin else host
        module._hf_hook = self  # type: ignore[assignment]

    def _tensors(self) -> Iterable[torch.Tensor]:
        return itertools.chain(self.module.parameters(), self.module.buffers())

    def onload(self) -> None:
        if not self._resting:
            self._resting = [(tensor, tensor.data) for tensor in self._tensors()]
            for tensor, host in self._resting:
                tensor.data = host.to(self.execution_device, non_blocking=True)

    def rest(self) -> None:
        """Point the tensors at host memory again, which frees the copies."""
        for tensor, host in self._resting:
            tensor.data = host
        self._resting = []


def keep_in_host_memory(
    module: nn.Module, device: torch.device, *, pin: bool, entry_points: Iterable[str] = ("forward",)
) -> None:
    """Rest `module` in host memory; have it on `device` for the length of each call of an entry point."""
    resident = HostResident(module, device, pin=pin)

    def onloaded(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            resident.onload()
            try:
                return method(*args, **kwargs)
            finally:
                resident.rest()

        return call

    for name in entry_points:
        setattr(module, name, onloaded(getattr(module, name)))


def keep_in_host_memory_between_jobs(
    modules: Iterable[nn.Module], device: torch.device, *, pin: bool
) -> Callable[[], None]:
    """Rest `modules` in host memory; each comes to `device` when it is first called and stays there for further steps.

    At most one of them is there at a time: of two experts, the one for low noise displaces the one for high noise.

    Returns:
        What to call when the last step is done: it rests them all.
    """
    residents = [HostResident(module, device, pin=pin) for module in modules]

    def take_turn(resident: HostResident) -> None:
        for other in residents:
            if other is not resident:
                other.rest()
        resident.onload()

    for resident in residents:
        resident.module.register_forward_pre_hook(lambda module, inputs, mine=resident: take_turn(mine))

    def rest_all() -> None:
        for resident in residents:
            resident.rest()

    return rest_all


def stream_blocks(module: nn.Module, device: torch.device, *, pin: bool) -> None:
    """Copy each of the module's blocks to `device` while the one before it computes; its host tensors stay."""
    apply_group_offloading(
        module,
        onload_device=device,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
        record_stream=True,
        # Pins each block only while it is copied.
        low_cpu_mem_usage=not pin,
    )


def place(
    components: Mapping[str, nn.Module], transformers: Collection[str], args: ServerArgs, device: torch.device
) -> Callable[[], None]:
    """Put each component where `args` wants it: on `device`, or in host memory until it is used.

    Args:
        transformers: which of the components denoise.

    Returns:
        What to call when a job has done its last denoising step.
    """
    between_jobs = []
    for name, module in components.items():
        if device.type == "cpu":
            module.to(device)
        elif name in transformers and args.dit_layerwise_offload:
            stream_blocks(module, device, pin=args.pin_cpu_memory)
        elif name in transformers and args.dit_cpu_offload:
            between_jobs.append(module)
        elif name == "vae" and args.vae_cpu_offload:
            keep_in_host_memory(module, device, pin=args.pin_cpu_memory, entry_points=VAE_ENTRY_POINTS)
        elif name.startswith(ENCODERS) and args.text_encoder_cpu_offload:
            keep_in_host_memory(module, device, pin=args.pin_cpu_memory)
        else:
            module.to(device)
    asked = [name for name in type(args).model_fields if name.endswith("_offload") and getattr(args, name)]
    if asked and device.type == "cpu":
        logger.info("%s: nothing to do on a CPU, where everything is in host memory", ", ".join(asked))
    return keep_in_host_memory_between_jobs(between_jobs, device, pin=args.pin_cpu_memory)
