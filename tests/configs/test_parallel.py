"""The degrees of parallelism multiply to the number of GPUs, or the error is the equation that they break."""

from __future__ import annotations

import pytest

from configs.parallel import ParallelDims


def resolved(num_gpus: int, **degrees: int | bool) -> tuple[int, int, int, int]:
    dims = ParallelDims.resolve(num_gpus, **degrees)
    return dims.dp_size, dims.cfg_degree, dims.ring_degree, dims.ulysses_degree


@pytest.mark.parametrize(
    ("num_gpus", "degrees", "dp_cfg_ring_ulysses"),
    [
        (1, {}, (1, 1, 1, 1)),
        (4, {}, (1, 1, 1, 4)),
        (4, {"ulysses_degree": 2}, (1, 1, 2, 2)),
        (4, {"ring_degree": 4}, (1, 1, 4, 1)),
        (4, {"ulysses_degree": 2, "ring_degree": 2}, (1, 1, 2, 2)),
        (4, {"sp_degree": 4, "ring_degree": 2}, (1, 1, 2, 2)),
        (4, {"enable_cfg_parallel": True}, (1, 2, 1, 2)),
        (4, {"dp_size": 2}, (2, 1, 1, 2)),
        (8, {"dp_size": 2, "enable_cfg_parallel": True, "ulysses_degree": 2}, (2, 2, 1, 2)),
    ],
)
def test_degrees_left_out_are_filled_in_with_ulysses_first(num_gpus, degrees, dp_cfg_ring_ulysses) -> None:
    assert resolved(num_gpus, **degrees) == dp_cfg_ring_ulysses


def test_the_gang_is_one_replica_and_its_sequence_shards_are_ring_times_ulysses() -> None:
    dims = ParallelDims(dp_size=3, cfg_degree=2, ring_degree=2, ulysses_degree=4)
    assert (dims.sp_degree, dims.gang_size, dims.num_gpus) == (8, 16, 48)


@pytest.mark.parametrize(
    ("num_gpus", "degrees", "message"),
    [
        (
            4,
            {"ulysses_degree": 3},
            "num_gpus (4) must equal dp_size * cfg_degree * ulysses_degree * ring_degree (1 * 1 * 3 * 1 = 3)",
        ),
        (
            4,
            {"ulysses_degree": 2, "ring_degree": 1},
            "num_gpus (4) must equal dp_size * cfg_degree * ulysses_degree * ring_degree (1 * 1 * 2 * 1 = 2)",
        ),
        (
            1,
            {"enable_cfg_parallel": True},
            "num_gpus (1) must equal dp_size * cfg_degree * ulysses_degree * ring_degree (1 * 2 * 1 * 1 = 2)",
        ),
        (
            6,
            {"dp_size": 4},
            "num_gpus (6) must equal dp_size * cfg_degree * ulysses_degree * ring_degree (4 * 1 * 1 * 1 = 4)",
        ),
        (
            4,
            {"sp_degree": 4, "ulysses_degree": 2, "ring_degree": 1},
            "sp_degree (4) must equal ulysses_degree * ring_degree (2 * 1 = 2)",
        ),
        (
            4,
            {"sp_degree": 4, "ulysses_degree": 3},
            "sp_degree (4) must equal ulysses_degree * ring_degree (3 * 1 = 3)",
        ),
    ],
)
def test_degrees_that_do_not_multiply_are_refused_with_the_equation(num_gpus, degrees, message) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        ParallelDims.resolve(num_gpus, **degrees)
    assert str(refusal.value) == message
