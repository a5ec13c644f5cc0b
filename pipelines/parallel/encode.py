"""`share_encodings`: only rank 0 holds the prompt encoders; it sends its encodings to the other ranks."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from torch.utils._pytree import tree_map_only

from pipelines.parallel.mesh import Mesh

ENCODERS = ("encode_prompt", "encode_image")
"""The only methods through which diffusers' pipelines use text and vision encoders."""


def share_encodings(pipeline: DiffusionPipeline, mesh: Mesh) -> None:
    """Make rank 0's `encode_prompt` (and `encode_image`, if there is one) serve every rank of `mesh`.

    The other ranks pass `None` for the encoders, tokenizers and their processors when they load the pipeline;
    everything else must be there. Each call is a collective: every rank makes it, in the same order. An exception on
    rank 0 is raised on every rank, so that no rank waits for one that has given up.
    """
    for name in ENCODERS:
        if hasattr(pipeline, name):
            setattr(pipeline, name, shared(getattr(pipeline, name), mesh))


@dataclass(frozen=True)
class Blank:
    """A placeholder for a tensor, in the object that is sent ahead of the tensors."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Blank:
        return cls(tensor.shape, tensor.dtype)


def shared(encode: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`encode`, called on rank 0 only; every rank returns the same nested tuples, lists and tensors."""

    def shared_encode(*args: Any, **kwargs: Any) -> Any:
        encoded, error = None, None
        if mesh.rank == 0:
            try:
                encoded = encode(*args, **kwargs)
            except Exception as failure:
                error = portable(failure)
        announced = [tree_map_only(torch.Tensor, Blank.of, encoded), error]
        dist.broadcast_object_list(announced, group_src=0, group=mesh.control)
        blanks, error = announced
        if error is not None:
            try:
                raise error
            finally:  # its traceback refers to this frame: a reference back would keep alive what the encoder computed
                del error, announced
        if mesh.rank != 0:
            encoded = tree_map_only(Blank, lambda b: torch.empty(b.shape, dtype=b.dtype, device=mesh.device), blanks)

        def from_rank_0(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.to(mesh.device).contiguous()
            dist.broadcast(tensor, group_src=0, group=mesh.group)
            return tensor

        return tree_map_only(torch.Tensor, from_rank_0, encoded)

    return shared_encode


def portable(error: Exception) -> Exception:
    """`error`, or a RuntimeError with its name and message if it does not survive pickling: otherwise the waiting ranks
    would get no error, or another one."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
