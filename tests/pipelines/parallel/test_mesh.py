from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from configs.parallel import ParallelDims
from pipelines.parallel.mesh import Mesh
from tests.gang import Gang, RankError

pytestmark = pytest.mark.gang

GUIDED = ParallelDims(cfg_degree=2, ulysses_degree=2)
BOTH = ParallelDims(ulysses_degree=2, ring_degree=2)


def groups(mesh: Mesh) -> dict[str, dist.ProcessGroup]:
    """The groups in which this rank is not alone."""
    by_name = {"sequence": mesh.sequence, "ulysses": mesh.ulysses, "ring": mesh.ring, "cfg": mesh.cfg}
    return {name: group for name, group in by_name.items() if group is not None}


def neighbours(mesh: Mesh) -> dict[str, list[int]]:
    return {name: dist.get_process_group_ranks(group) for name, group in groups(mesh).items()}


def test_ulysses_neighbours_are_adjacent_and_ring_neighbours_are_not(gang: Gang) -> None:
    everyone = [0, 1, 2, 3]
    assert gang.run(neighbours, BOTH) == [
        {"sequence": everyone, "ulysses": [0, 1], "ring": [0, 2]},
        {"sequence": everyone, "ulysses": [0, 1], "ring": [1, 3]},
        {"sequence": everyone, "ulysses": [2, 3], "ring": [0, 2]},
        {"sequence": everyone, "ulysses": [2, 3], "ring": [1, 3]},
    ]


def test_each_branch_of_guidance_shards_its_own_sequence(gang: Gang) -> None:
    by_rank = gang.run(neighbours, GUIDED)
    assert [rank["sequence"] for rank in by_rank] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["cfg"] for rank in by_rank] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_an_axis_of_one_rank_has_no_group(gang: Gang) -> None:
    assert [set(rank) for rank in gang.run(neighbours, ParallelDims(ulysses_degree=4))] == [{"sequence", "ulysses"}] * 4
    assert [set(rank) for rank in gang.run(neighbours, ParallelDims(cfg_degree=2))] == [{"cfg"}] * 2


def coordinates(mesh: Mesh) -> bool:
    """Whether the coordinates that the mesh computes are this rank's numbers in its groups."""
    computed = {
        "cfg": mesh.cfg_rank,
        "ring": mesh.ring_rank,
        "ulysses": mesh.ulysses_rank,
        "sequence": mesh.sequence_rank,
    }
    alone = dict.fromkeys(computed, 0)
    return computed == alone | {name: dist.get_rank(group) for name, group in groups(mesh).items()}


@pytest.mark.parametrize("dims", [BOTH, GUIDED, ParallelDims(cfg_degree=2, ring_degree=2)], ids=str)
def test_coordinates_are_ranks_within_the_groups(gang: Gang, dims: ParallelDims) -> None:
    assert all(gang.run(coordinates, dims))


def agree_on_own_rank(mesh: Mesh) -> int:
    return mesh.agree(10 + mesh.rank)


def test_all_ranks_agree_on_what_rank_0_says(gang: Gang) -> None:
    assert gang.run(agree_on_own_rank, BOTH) == [10, 10, 10, 10]


def raise_on_rank_2(mesh: Mesh) -> None:
    if mesh.rank == 2:
        raise KeyError("lost")
    dist.broadcast(torch.zeros(1), group_src=2, group=mesh.group)


def test_a_rank_that_leaves_makes_its_waiting_peers_fail_rather_than_hang(gang: Gang) -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match="KeyError: 'lost'"):
        gang.run(raise_on_rank_2, BOTH)
    assert time.monotonic() - started < 30
    assert gang.run(agree_on_own_rank, BOTH) == [10, 10, 10, 10], "the gang must meet again"
