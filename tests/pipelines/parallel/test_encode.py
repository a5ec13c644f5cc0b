"""Encodings come from rank 0, which alone has encoders."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.parallel import ParallelDims
from pipelines.parallel.encode import share_encodings, shared
from pipelines.parallel.mesh import Mesh
from tests.gang import Gang

pytestmark = pytest.mark.gang

DIMS = ParallelDims(ulysses_degree=2, ring_degree=2)


class Encoder:
    """Stands in for a pipeline: its `result` tells which rank computed it."""

    def __init__(self, result: Any = None, error: Exception | None = None):
        self.result = result
        self.error = error
        self.calls = 0

    def encode_prompt(self, prompt: str, scale: float = 1.0) -> Any:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return self.result


def nested(rank: int) -> Any:
    return (
        torch.full((1, 3, 2), float(rank), dtype=torch.bfloat16),
        [torch.ones(2, dtype=torch.bool).logical_and(torch.tensor([True, rank == 0])), None],
        torch.arange(12).view(3, 4).t() + rank,
        (torch.empty(0, 5), rank),
    )


def test_an_error_leaves_nothing_for_the_cycle_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an encoder computed before it failed takes gigabytes on a GPU."""
    activations: list[weakref.ref[Encoder]] = []

    def encode_prompt() -> None:
        held = Encoder()
        activations.append(weakref.ref(held))
        raise ValueError("too long")

    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda *args, **kwargs: None)
    leader: Any = SimpleNamespace(rank=0, control=None)
    gc.disable()
    try:
        with pytest.raises(ValueError, match="too long"):
            shared(encode_prompt, leader)()
        assert activations[0]() is None
    finally:
        gc.enable()


def encode_nested(mesh: Mesh) -> tuple[Any, int]:
    pipeline = Encoder(nested(mesh.rank))
    share_encodings(pipeline, mesh)
    return pipeline.encode_prompt("a cat", scale=2.0), pipeline.calls


def test_every_rank_gets_the_nested_result_of_rank_0(gang: Gang) -> None:
    by_rank = gang.run(encode_nested, DIMS)
    assert [calls for _, calls in by_rank] == [1, 0, 0, 0]
    for result, _ in by_rank:
        torch.testing.assert_close(result, nested(0), rtol=0, atol=0)


class Refusal(ValueError):
    """Can be pickled, but not unpickled."""

    def __init__(self, message: str, param: str):
        super().__init__(message)
        self.param = param


class Locked(ValueError):
    """Cannot be pickled."""

    def __init__(self, message: str):
        super().__init__(message)
        self.lock = threading.Lock()


def encode_and_fail(mesh: Mesh, make_error: Callable[[], Exception]) -> tuple[str, str]:
    pipeline = Encoder(error=make_error())
    share_encodings(pipeline, mesh)
    try:
        pipeline.encode_prompt("a cat")
    except Exception as error:
        return type(error).__name__, str(error)
    return "no error", ""


def too_long() -> Exception:
    return ValueError("the prompt is too long")


def refused() -> Exception:
    return Refusal("the prompt is too long", param="prompt")


def locked() -> Exception:
    return Locked("the prompt is too long")


def test_an_error_of_rank_0_is_raised_on_every_rank(gang: Gang) -> None:
    assert gang.run(encode_and_fail, DIMS, too_long) == [("ValueError", "the prompt is too long")] * 4


@pytest.mark.parametrize("make_error", [refused, locked])
def test_an_error_that_cannot_travel_is_raised_on_every_rank_by_name(
    gang: Gang, make_error: Callable[[], Exception]
) -> None:
    name = type(make_error()).__name__
    assert gang.run(encode_and_fail, DIMS, make_error) == [("RuntimeError", f"{name}: the prompt is too long")] * 4
