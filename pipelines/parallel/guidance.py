"""CFG parallelism: the two branches of classifier-free guidance on different halves of a gang.

Pipelines come in two kinds. Some (Wan, FLUX, Qwen-Image) call the transformer once per branch: each half computes one
of the calls, and the halves exchange the results. Others (SD3, Z-Image) put both branches into one batch: each half
computes half of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from pipelines.parallel.mesh import Mesh, all_gather_single

BRANCHES = 2


class Guidance:
    """The exchange of outputs between the halves of a gang, within one denoising step."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._outputs: list[torch.Tensor] = []
        """Outputs of this step's calls, in order. Half i computes call i; on the other half it is still blank."""

    def branch(self, compute: Callable[[], torch.Tensor], blank: torch.Tensor) -> torch.Tensor:
        """The output of one call: computed here, or `blank`, which is filled in before anything reads it.

        A pipeline reads no output before it has made both calls (without guidance, its only one). So the first output
        is filled in at the second call, or else by `settle`.
        """
        output = compute() if len(self._outputs) == self._mesh.cfg_rank else blank
        self._outputs.append(output)
        if len(self._outputs) == BRANCHES:
            self.settle()
        return output

    def settle(self) -> None:
        """Exchange the outputs computed since the last exchange."""
        for branch, output in enumerate(self._outputs):
            dist.broadcast(output, group_src=branch, group=self._mesh.cfg)
        self._outputs.clear()

    def attend(self, scheduler: Any) -> None:
        """Settle before each step of a job's own scheduler, which without guidance is the first to read an output."""
        self._outputs.clear()  # left by a job that failed within a step
        step = scheduler.step

        def settled_step(*args: Any, **kwargs: Any) -> Any:
            self.settle()
            return step(*args, **kwargs)

        scheduler.step = settled_step


def share_guidance(transformers: Iterable[nn.Module], mesh: Mesh) -> Guidance:
    """Divide the branches of guidance between the halves of `mesh`; call it after `shard_sequence`.

    Every rank passes the same inputs and gets the same outputs, once `Guidance.attend` has wrapped the job's scheduler.
    The transformers of one pipeline (both experts of Wan 2.2) share one `Guidance`.
    """
    guidance = Guidance(mesh)
    for transformer in transformers:
        # Pipelines tell a `CacheMixin` which branch they call it for, so they call it once per branch.
        hook = CallPerBranch(guidance) if isinstance(transformer, CacheMixin) else HalfOfBatch(mesh)
        HookRegistry.check_if_exists_or_initialize(transformer).register_hook(hook, "share guidance")
    return guidance


class CallPerBranch(ModelHook):
    """Computes only this half's calls."""

    def __init__(self, guidance: Guidance):
        super().__init__()
        self._guidance = guidance

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        def compute() -> torch.Tensor:
            return self.fn_ref.original_forward(*args, **kwargs)[0].contiguous()

        return (self._guidance.branch(compute, blank_output(module, kwargs["hidden_states"])),)


def blank_output(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """An uninitialised output for latents `(B, C, F, H, W)` or packed tokens `(B, S, C)`."""
    shape = list(hidden_states.shape)
    if hidden_states.dim() == 5:
        shape[1] = module.config.out_channels
    else:
        shape[2] = module.proj_out.out_features
    return hidden_states.new_empty(shape)


class HalfOfBatch(ModelHook):
    """Computes this half's part of a batch that holds both branches; every rank computes a batch of one."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self._mesh = mesh

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any]:
        batch = len(args[0] if args else next(iter(kwargs.values())))  # the latents come first
        if batch % BRANCHES:
            return self.fn_ref.original_forward(*args, **kwargs)
        size = batch // BRANCHES
        part = slice(self._mesh.cfg_rank * size, (self._mesh.cfg_rank + 1) * size)

        def mine(value: Any) -> Any:
            batched = isinstance(value, list) or (isinstance(value, torch.Tensor) and value.dim() > 0)
            return value[part] if batched and len(value) == batch else value

        output = self.fn_ref.original_forward(
            *map(mine, args), **{name: mine(value) for name, value in kwargs.items()}
        )[0]
        if isinstance(output, list):  # Z-Image: one tensor per item
            return (list(self._gathered(torch.stack(output))),)
        return (self._gathered(output),)

    def _gathered(self, half: torch.Tensor) -> torch.Tensor:
        whole = half.new_empty(BRANCHES * half.shape[0], *half.shape[1:])
        all_gather_single(whole, half.contiguous(), group=self._mesh.cfg)
        return whole
