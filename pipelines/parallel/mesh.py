"""`Mesh`: the ranks of one gang, their coordinates, and the process groups along each axis."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import cast

import torch
import torch.distributed as dist

from configs.parallel import ParallelDims

Group = dist.ProcessGroup

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Renamed in torch 2.13, which warns about the old name."""


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the row-major mesh `(cfg, ring, ulysses)` and the groups it belongs to.

    A mesh is one replica: `dims.dp_size` plays no part in it. A gang of one has no mesh.
    """

    rank: int
    dims: ParallelDims
    device: torch.device
    group: Group
    """The whole gang."""
    sequence: Group | None
    """The ranks that share one token sequence: a plane of the mesh, row-major over `(ring, ulysses)`. Here and below,
    None means that this rank is alone: nothing may be sent, because torch takes None for the whole gang."""
    ulysses: Group | None
    ring: Group | None
    cfg: Group | None
    """The ranks that hold the same tokens, one in each branch of guidance."""
    control: Group
    """The whole gang over gloo, for objects and decisions, which must not wait for a GPU stream."""

    @classmethod
    def create(cls, dims: ParallelDims, rank: int, device: torch.device, init_method: str, timeout: timedelta) -> Mesh:
        """Join the other ranks; return once all have joined.

        Args:
            dims: sizes of the axes; `dims.gang_size` ranks must call this.
            rank: this rank, 0 to `dims.gang_size - 1`.
            device: where this rank's tensors live. Under Ray each actor sees one GPU, so it is `cuda:0` on every rank.
            init_method: `tcp://host:port` on rank 0's host, or `file://path` of a file that does not exist yet.
            timeout: how long any collective may wait for its peers before it raises.
        """
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            init_method=init_method,
            rank=rank,
            world_size=dims.gang_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )

        gang = cast(Group, dist.group.WORLD)

        @cache
        def group_of(rows: tuple[tuple[int, ...], ...]) -> Group | None:
            if len(rows) == 1:
                return gang
            if len(rows) == dims.gang_size:
                return None
            return dist.new_subgroups_by_enumeration(rows, timeout=timeout)[0]

        def group_along(ranks: torch.Tensor) -> Group | None:
            """This rank's group, where each row of `ranks` is a group.

            Axes with the same rows share groups, and a row of one rank gets none: each gloo group has a thread that
            wakes 100 times a second, which takes 0.3 % of a slow core.
            """
            return group_of(tuple(map(tuple, ranks.tolist())))

        # Plain groups rather than `init_device_mesh("cuda")`, which sets the device from LOCAL_RANK.
        mesh = torch.arange(dims.gang_size).view(dims.cfg_degree, dims.ring_degree, dims.ulysses_degree)
        return cls(
            rank=rank,
            dims=dims,
            device=device,
            group=gang,
            sequence=group_along(mesh.flatten(1)),
            ulysses=group_along(mesh.flatten(0, 1)),
            ring=group_along(mesh.movedim(1, -1).flatten(0, 1)),
            cfg=group_along(mesh.movedim(0, -1).flatten(0, 1)),
            control=dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else gang,
        )

    @property
    def size(self) -> int:
        return self.dims.gang_size

    @property
    def cfg_rank(self) -> int:
        return self.rank // self.dims.sp_degree

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.dims.sp_degree

    @property
    def ring_rank(self) -> int:
        return self.sequence_rank // self.dims.ulysses_degree

    @property
    def ulysses_rank(self) -> int:
        return self.rank % self.dims.ulysses_degree

    def agree(self, value: int) -> int:
        """Rank 0's `value`, on every rank, so that all ranks act alike at a step boundary."""
        decision = torch.tensor(value)
        dist.broadcast(decision, group_src=0, group=self.control)
        return int(decision)

    def close(self) -> None:
        """Leave all groups. A collective in which a peer still waits fails on that peer."""
        dist.destroy_process_group()
