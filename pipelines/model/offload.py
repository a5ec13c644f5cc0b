"""Components that live in host memory and move to the GPU only while they are used."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from configs.server_args import ServerArgs

logger = logging.getLogger(__name__)

VAE_ENTRY_POINTS = ("encode", "decode")
"""The methods of a VAE that pipelines call; they never call its `forward`."""

ENCODERS = ("text_encoder", "image_encoder")
"""Prefixes of the names of prompt encoders."""


def tensors_of(module: nn.Module) -> Iterable[torch.Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


class HostResident:
    """A module whose tensors rest in host memory and point at copies on the device while it is used.

    Nothing is copied back, so running the module must not change weights. Editing a resting weight in place (a LoRA
    merge) edits the host tensor, and the next run sees it.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, pin: bool):
        """Move the module's tensors to host memory, page-locked with `pin`: copies from pinned memory are several times
        faster and do not block the host."""
        self.execution_device = device
        """The device for the module's inputs. Pipelines look it up in the module's `_hf_hook` (accelerate)."""
        self.module = module
        self._resting: list[tuple[torch.Tensor, torch.Tensor]] = []
        for tensor in tensors_of(module):
            host = tensor.data.cpu()
            tensor.data = host.pin_memory() if pin else host
        module._hf_hook = self  # type: ignore[assignment]

    def onload(self, copying: AbstractContextManager[object] | None = None) -> None:
        """Point the tensors at device memory, filled within `copying`: the context of a stream, or none."""
        if self._resting:
            return
        self._resting = [(tensor, tensor.data) for tensor in tensors_of(self.module)]
        for tensor, host in self._resting:
            tensor.data = torch.empty_like(host, device=self.execution_device)
        with copying or nullcontext():
            for tensor, host in self._resting:
                tensor.data.copy_(host, non_blocking=True)

    def rest(self) -> None:
        """Point the tensors at host memory again, which frees the copies."""
        for tensor, host in self._resting:
            tensor.data = host
        self._resting = []


def keep_in_host_memory(
    module: nn.Module, device: torch.device, *, pin: bool, entry_points: Iterable[str] = ("forward",)
) -> None:
    """Keep `module` in host memory; move it to `device` for the duration of each entry point call."""
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
    """Keep `modules` in host memory; each moves to `device` at its first call and stays there for further steps.

    At most one of them is there at a time: of two experts, the one for low noise displaces the one for high noise.

    Returns:
        A function that rests them all, to be called when the last step is done.
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
        torch.get_device_module(device).synchronize()  # a copy in flight must not read a weight that is edited at rest
        for resident in residents:
            resident.rest()

    return rest_all


class BlockStream:
    """Blocks that rest in host memory: while one computes, the weights of the next are copied to the device.

    So two of them are on the device at a time. After the last block comes the first, for the next step. Blocks that run
    out of list order still work; they are just not copied ahead.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, *, pin: bool):
        self._residents = [HostResident(block, device, pin=pin) for block in blocks]
        self._backend = torch.get_device_module(device)
        self._copies = self._backend.Stream()
        """The stream that copies. Computation stays in the current stream."""
        for number, block in enumerate(blocks):
            block.forward = self._streamed(number, block.forward)

    def _streamed(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._begin(number)
            output = forward(*args, **kwargs)
            self._end(number)
            return output

        # Compiled blocks share the graph of `forward`. This wrapper holds a number, so each block would need its own.
        return torch.compiler.disable(call, recursive=False)

    @torch.compiler.disable
    def _begin(self, number: int) -> None:
        self._copy(number)
        self._backend.current_stream().wait_stream(self._copies)
        self._copy((number + 1) % len(self._residents))

    @torch.compiler.disable
    def _end(self, number: int) -> None:
        self._residents[number].rest()

    def _copy(self, number: int) -> None:
        """Copy a block that is not on the device yet, once all work launched so far is done.

        Its memory belongs to the computing stream, and a finished block may have just freed it. So however far the host
        runs ahead of the device, only the memory of two blocks is in use, not of all launched ones.
        """
        self._copies.wait_stream(self._backend.current_stream())
        self._residents[number].onload(self._backend.stream(self._copies))

    def rest(self) -> None:
        """Point all blocks at host memory again: the one copied last, and those of a failed forward."""
        # The host may be ahead of the device: a copy still in flight must neither read a weight that is edited at rest
        # nor write to memory that has been freed.
        self._backend.synchronize()
        for resident in self._residents:
            resident.rest()


def stream_blocks(module: nn.Module, device: torch.device, *, pin: bool) -> Callable[[], None]:
    """Stream the module's blocks (the items of its module lists) to `device`; everything else stays there.

    The rest is small, but FLUX.2's 1.6 GB of it would take longer to move in each step than several blocks. Without
    `pin` each copy blocks the host, which meanwhile launches nothing that the copy could hide behind.

    Returns:
        A function that rests all blocks, to be called when the last step is done.
    """
    blocks = [block for child in module.children() if isinstance(child, nn.ModuleList) for block in child]
    streamed = {id(tensor) for block in blocks for tensor in tensors_of(block)}
    for tensor in tensors_of(module):
        if id(tensor) not in streamed:
            tensor.data = tensor.data.to(device)
    return BlockStream(blocks, device, pin=pin).rest


def place(
    components: Mapping[str, nn.Module], transformers: Collection[str], args: ServerArgs, device: torch.device
) -> Callable[[], None]:
    """Put each component where `args` wants it: on `device`, or in host memory until it is used.

    Args:
        transformers: which of the components denoise.

    Returns:
        A function that rests the components that denoise, to be called after a job's last denoising step.
    """
    between_jobs = []
    rests = []
    for name, module in components.items():
        if device.type == "cpu":
            module.to(device)
        elif name in transformers and args.dit_layerwise_offload:
            rests.append(stream_blocks(module, device, pin=args.pin_cpu_memory))
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
    if between_jobs:
        rests.append(keep_in_host_memory_between_jobs(between_jobs, device, pin=args.pin_cpu_memory))

    def rest_all() -> None:
        for rest in rests:
            rest()

    return rest_all
