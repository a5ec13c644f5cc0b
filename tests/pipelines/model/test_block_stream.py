"""Blocks of a transformer come one by one from host memory. Here the device is other host memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers.hooks import HookRegistry
from torch import nn

from configs.server_args import ServerArgs
from pipelines.generation.generation import generate
from pipelines.job import Task
from pipelines.model.load import Model, load_model
from pipelines.model.offload import stream_blocks
from pipelines.parallel.guidance import CallPerBranch
from tests.pipelines.conftest import make_job

DEVICE = torch.device("cpu")
X = torch.ones(1, 1, 2)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Block(nn.Module):
    def __init__(self, called: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        self.called = called

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.called is not None:
            self.called()
        return self.linear(x)

    @property
    def address(self) -> int:
        return self.linear.weight.data_ptr()


class Blocks(nn.Module):
    """A transformer: blocks in two lists, between an embedding and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Block(lambda: self.outside.append(self.embed.address))
        self.outside: list[int] = []
        """The address of the embedding's weights at each of its calls."""
        self.away: list[list[int]] = []
        """At each call of a block, which blocks were not at home."""
        self.double_blocks = nn.ModuleList(Block(lambda: self.away.append(self.not_at_home())) for _ in range(3))
        self.single_blocks = nn.ModuleList(Block(lambda: self.away.append(self.not_at_home())) for _ in range(2))
        self.proj_out = Block()
        self.homes = self.addresses()

    @property
    def blocks(self) -> list[Any]:
        return [*self.double_blocks, *self.single_blocks]

    def addresses(self) -> list[int]:
        return [block.address for block in self.blocks]

    def not_at_home(self) -> list[int]:
        return [i for i, (now, home) in enumerate(zip(self.addresses(), self.homes, strict=True)) if now != home]

    def forward(self, hidden_states: torch.Tensor, fail_at: int | None = None) -> tuple[torch.Tensor]:
        hidden_states = self.embed(hidden_states)
        for i, block in enumerate(self.blocks):
            hidden_states = block(hidden_states if i != fail_at else torch.ones(7))
        return (self.proj_out(hidden_states),)


def edit(transformer: Blocks) -> None:
    """As merging an adapter does: in place, where the weights are."""
    for block in transformer.blocks:
        block.linear.weight.data.mul_(2)


def test_a_block_runs_on_a_copy_while_the_next_is_copied() -> None:
    transformer = Blocks()
    [expected] = transformer(X)
    rest = stream_blocks(transformer, DEVICE, pin=False)
    transformer.away.clear()
    for _ in range(2):
        assert torch.equal(transformer(X)[0], expected)
    assert transformer.away == 2 * [[0, 1], [1, 2], [2, 3], [3, 4], [0, 4]]
    assert transformer.not_at_home() == [0], "for the next step"
    rest()
    assert transformer.not_at_home() == []


def test_what_is_in_no_block_is_on_the_device_for_good() -> None:
    transformer = Blocks()
    home = transformer.embed.address
    with mock.patch.object(torch.Tensor, "to", lambda tensor, device: tensor.clone()):
        stream_blocks(transformer, DEVICE, pin=False)
    transformer(X)
    transformer(X)
    assert {transformer.embed.address} == set(transformer.outside) != {home}


def test_blocks_in_another_order_are_copied_when_they_are_called() -> None:
    transformer = Blocks()
    expected = transformer.blocks[3](transformer.blocks[1](X))
    stream_blocks(transformer, DEVICE, pin=False)
    assert torch.equal(transformer.blocks[3](transformer.blocks[1](X)), expected)


def test_an_edit_after_a_job_shows_in_the_next() -> None:
    transformer = Blocks()
    rest = stream_blocks(transformer, DEVICE, pin=False)
    [before] = transformer(X)
    rest()
    edit(transformer)
    assert torch.equal(transformer(X)[0], before * 2**5)


def test_blocks_rest_when_the_device_is_done_with_their_copies() -> None:
    """A job may be suspended, and an adapter merged, while the device is a step behind."""
    transformer = Blocks()
    rest = stream_blocks(transformer, DEVICE, pin=False)
    transformer(X)
    away: list[list[int]] = []
    with mock.patch.object(torch.cpu, "synchronize", side_effect=lambda: away.append(transformer.not_at_home())):
        rest()
    assert (away, transformer.not_at_home()) == ([[0]], [])


def test_an_edit_after_a_failed_job_shows_in_the_next() -> None:
    transformer = Blocks()
    rest = stream_blocks(transformer, DEVICE, pin=False)
    [before] = transformer(X)
    with pytest.raises(RuntimeError):
        transformer(X, fail_at=2)
    rest()
    edit(transformer)
    assert torch.equal(transformer(X)[0], before * 2**5)


@pytest.mark.parametrize("half", [0, 1])
def test_a_half_that_computes_one_branch_of_guidance_copies_nothing_for_the_other(half: int) -> None:
    """Calls that belong to the other half never reach the blocks."""
    transformer = Blocks()
    [expected] = transformer(X)
    blank = torch.zeros_like(X)
    calls = itertools.cycle([0, 1])
    guidance = mock.Mock(branch=lambda compute, blank: compute() if next(calls) == half else blank)
    HookRegistry.check_if_exists_or_initialize(transformer).register_hook(CallPerBranch(guidance), "share guidance")
    rest = stream_blocks(transformer, DEVICE, pin=False)
    transformer.away.clear()
    with mock.patch("pipelines.parallel.guidance.blank_output", return_value=blank):
        given = [transformer(hidden_states=X)[0] for _ in range(4)]
    assert [torch.equal(output, expected) for output in given] == [half == 0, half == 1] * 2
    assert transformer.away == 2 * [[0, 1], [1, 2], [2, 3], [3, 4], [0, 4]]
    rest()
    assert transformer.not_at_home() == []


def test_compiled_blocks_share_one_graph() -> None:
    """If its place in the stream were in a graph, each block would need its own, and most had none: the limit is 8."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    layers = nn.ModuleList(Block() for _ in range(12))
    expected = nn.Sequential(*layers)(X)
    for layer in layers:
        layer.compile(backend=backend)
    stream_blocks(nn.ModuleDict({"layers": layers}), DEVICE, pin=False)
    assert torch.equal(nn.Sequential(*layers)(X), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["wan2.2-t2v", "z-image", "flux2"])
def test_streaming_changes_no_pixel(
    tiny_model: Callable[[str], Model], tiny_model_path: Callable[[str], Path], name: str
) -> None:
    job = make_job(tiny_model(name), Task.TEXT_TO_IMAGE)
    *_, expected = generate(tiny_model(name), *job)
    model = load_model(ServerArgs(model_path=str(tiny_model_path(name)), device="cpu", dtype="fp32"))
    rests = [stream_blocks(transformer, DEVICE, pin=False) for transformer in model.transformers.values()]
    streaming = replace(model, rest_transformers=lambda: [rest() for rest in rests])
    *_, given = generate(streaming, *job)
    assert given.outputs == expected.outputs
