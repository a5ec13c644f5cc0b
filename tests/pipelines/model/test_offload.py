"""Weights rest in host memory and are elsewhere only while they are used. Here "elsewhere" is other host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from configs.server_args import ServerArgs
from pipelines.model import offload
from pipelines.model.offload import keep_in_host_memory, keep_in_host_memory_between_jobs, place

DEVICE = torch.device("cpu")


class Recording(nn.Module):
    """Records where its weight is when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        self.register_buffer("scale", torch.ones(1))
        self.seen: list[int] = []

    @property
    def address(self) -> int:
        return self.linear.weight.data_ptr()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.address)
        return self.linear(x) * self.scale

    def decode(self, x: torch.Tensor, fail: bool = False) -> torch.Tensor:
        if fail:
            raise RuntimeError("out of memory")
        return self.forward(x)


@torch.no_grad()
def test_a_module_runs_on_a_copy_and_rests_on_the_same_host_tensors() -> None:
    module, x = Recording(), torch.ones(1, 2)
    expected, home = module(x), module.address
    keep_in_host_memory(module, DEVICE, pin=False)
    assert torch.equal(module(x), expected)
    assert torch.equal(module(x), expected)
    assert home not in module.seen[1:]
    assert module.address == home


@torch.no_grad()
def test_an_edit_of_a_resting_weight_shows_in_the_next_run() -> None:
    module, x = Recording(), torch.ones(1, 2)
    keep_in_host_memory(module, DEVICE, pin=False)
    before = module(x)
    module.linear.weight.addmm_(torch.ones(2, 1), torch.ones(1, 2))
    assert torch.allclose(module(x), before + 2)


@torch.no_grad()
def test_other_entry_points_than_forward_are_onloaded_too() -> None:
    module = Recording()
    home = module.address
    keep_in_host_memory(module, DEVICE, pin=False, entry_points=("decode",))
    module.decode(torch.ones(1, 2))
    assert module.seen != [home]
    assert module.address == home


def test_a_failed_run_leaves_the_module_at_rest() -> None:
    module = Recording()
    home = module.address
    keep_in_host_memory(module, DEVICE, pin=False, entry_points=("decode",))
    with pytest.raises(RuntimeError, match="out of memory"):
        module.decode(torch.ones(1, 2), fail=True)
    assert module.address == home


@torch.no_grad()
def test_a_shared_weight_stays_shared() -> None:
    module = Recording()
    module.tied = nn.Linear(2, 2, bias=False)
    module.tied.weight = module.linear.weight
    keep_in_host_memory(module, DEVICE, pin=False)
    module(torch.ones(1, 2))
    assert module.tied.weight is module.linear.weight


@torch.no_grad()
def test_transformers_stay_between_steps_and_rest_after_the_last() -> None:
    module = Recording()
    home = module.address
    rest = keep_in_host_memory_between_jobs([module], DEVICE, pin=False)
    module(torch.ones(1, 2))
    module(torch.ones(1, 2))
    assert module.seen[0] == module.seen[1] != home
    there: list[bool] = []
    with mock.patch.object(torch.cpu, "synchronize", side_effect=lambda: there.append(module.address != home)):
        rest()
    assert there == [True], "the device is waited for, which may be a step behind, with copies of what is edited next"
    assert module.address == home


@torch.no_grad()
def test_one_expert_displaces_the_other() -> None:
    high, low = Recording(), Recording()
    homes = high.address, low.address
    rest = keep_in_host_memory_between_jobs([high, low], DEVICE, pin=False)
    high(torch.ones(1, 2))
    low(torch.ones(1, 2))
    assert high.address == homes[0]
    assert low.address != homes[1]
    rest()
    assert (high.address, low.address) == homes


def test_the_host_memory_is_pinned_if_asked_for() -> None:
    pinned = torch.nn.Parameter(torch.zeros(2, 2))
    with mock.patch.object(torch.Tensor, "pin_memory", return_value=pinned.data):
        plain, locked = Recording(), Recording()
        keep_in_host_memory(plain, DEVICE, pin=False)
        keep_in_host_memory(locked, DEVICE, pin=True)
    assert plain.address != pinned.data_ptr()
    assert locked.address == pinned.data_ptr()


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """How `place` treats each component on a GPU."""

    def placed(**options: Any) -> dict[str, str]:
        components = {name: nn.Module() for name in ("text_encoder", "image_encoder", "vae", "transformer")}
        treatment: dict[int, str] = {}

        def note(kind: str) -> Callable[..., None]:
            return lambda module, *args, **kwargs: treatment.update({id(module): kind})

        monkeypatch.setattr(nn.Module, "to", note("device"))
        monkeypatch.setattr(offload, "keep_in_host_memory", note("host"))
        monkeypatch.setattr(offload, "stream_blocks", note("streamed"))
        monkeypatch.setattr(
            offload,
            "keep_in_host_memory_between_jobs",
            lambda modules, *args, **kwargs: [note("host between jobs")(module) for module in modules],
        )
        place(components, ["transformer"], ServerArgs(**options), torch.device("cuda:0"))
        return {name: treatment[id(module)] for name, module in components.items()}

    return placed


def test_each_flag_moves_its_components_and_no_others(placed: Callable[..., dict[str, str]]) -> None:
    on_device = dict.fromkeys(("text_encoder", "image_encoder", "vae", "transformer"), "device")
    assert placed() == on_device
    assert placed(text_encoder_cpu_offload=True) == {**on_device, "text_encoder": "host", "image_encoder": "host"}
    assert placed(vae_cpu_offload=True) == {**on_device, "vae": "host"}
    assert placed(dit_cpu_offload=True) == {**on_device, "transformer": "host between jobs"}
    assert placed(dit_layerwise_offload=True) == {**on_device, "transformer": "streamed"}


def test_pipelines_are_told_where_an_offloaded_module_runs() -> None:
    """They send inputs there, although the weights rest on the CPU."""
    from diffusers.utils.torch_utils import get_module_execution_device

    module = Recording()
    keep_in_host_memory(module, torch.device("cuda:0"), pin=False)
    assert get_module_execution_device(module) == torch.device("cuda:0")
