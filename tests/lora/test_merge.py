"""Merging is exact: the right weights while merged, the checkpoint's own bits when restored, whatever happens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from lora.factors import Delta, Factors, LowRank, Update
from lora.merge import Merger
from lora.originals import Checkpoint, HostCopies
from tests.lora.adapters import modules_of, train

Transformers = Callable[[str], dict[str, nn.Module]]
Composition = Sequence[tuple[Factors, float, tuple[str, ...]]]

ALL = ("all",)
ADAPTERS = {
    "attention": r"blocks\.\d+\.attn1\.to_[qkv]",
    "feed-forward": r"blocks\.[01]\.ffn\.net\.2",
    "overlapping": r"blocks\.[12]\.(attn1\.to_q|attn2\.to_v)",
    "convolution": "patch_embedding",
}


def factors(model: dict[str, nn.Module], layers: str, seed: int = 0) -> Factors:
    """An adapter with a bias update in its first layer, for every transformer."""
    trained = train(model["transformer"], layers, r=4, seed=seed)
    updates: dict[str, Update] = {}
    for module in modules_of(trained.state):
        down, up = (trained.state[f"{module}.lora_{half}.weight"] for half in "AB")
        updates[f"{module}.weight"] = LowRank(down, up.flatten(1), 1.5)
    bias = next(iter(updates)).replace(".weight", ".bias")
    updates[bias] = Delta(torch.full(model["transformer"].get_parameter(bias).shape, 0.1))
    return Factors(dict.fromkeys(model, updates))


def bits(model: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Every parameter and buffer as raw bytes."""
    return {
        f"{name}.{key}": tensor.detach().clone().view(torch.uint8)
        for name, module in model.items()
        for key, tensor in module.state_dict().items()
    }


def assert_same_bits(model: dict[str, nn.Module], before: dict[str, torch.Tensor]) -> None:
    after = bits(model)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def model(request: pytest.FixtureRequest, transformers: Transformers) -> dict[str, nn.Module]:
    return {name: module.to(request.param) for name, module in transformers("wan2.2-t2v").items()}


@pytest.fixture(params=["copy", "reload"])
def merger(request: pytest.FixtureRequest, model: dict[str, nn.Module], tmp_path: Path) -> Merger:
    """For `model`, with base weights from host copies or from the checkpoint."""
    if request.param == "copy":
        return Merger(model, HostCopies())
    for name, transformer in model.items():
        transformer.save_pretrained(tmp_path / name)
    return Merger(model, Checkpoint(model, tmp_path))


def expected(base: torch.Tensor, parts: Sequence[tuple[Update, float]]) -> torch.Tensor:
    """The composition's weight in fp64."""
    total = base.double()
    for update, strength in parts:
        if isinstance(update, Delta):
            total = total + strength * update.scale * update.delta.double()
        else:
            delta = (update.up.double() @ update.down.double().flatten(1)).reshape(total.shape)
            total = total + strength * update.scale * delta
    return total


@pytest.mark.parametrize("composition", [["attention"], ["attention", "overlapping"], ["convolution", "feed-forward"]])
def test_a_composition_is_the_sum_of_its_adapters_rounded_once(
    composition: list[str], model: dict[str, nn.Module], merger: Merger
) -> None:
    base = {key: value.clone() for key, value in model["transformer"].state_dict().items()}
    parts = [(factors(model, ADAPTERS[name], seed), 0.5 + seed) for seed, name in enumerate(composition)]
    merger.merge([(factors(model, ADAPTERS["overlapping"], 7), 1.0, ALL)])
    merger.merge([(adapter, strength, ALL) for adapter, strength in parts])

    for name, tensor in model["transformer"].state_dict().items():
        updates = [(a.updates["transformer"][name], s) for a, s in parts if name in a.updates["transformer"]]
        if not updates:
            assert torch.equal(tensor, base[name])
            continue
        exact = expected(base[name], updates)
        # Half an epsilon of the weight is the one rounding; the factors were already rounded to the weight's precision.
        epsilon = torch.finfo(tensor.dtype).eps
        largest = (exact - base[name].double()).abs().max().item()
        torch.testing.assert_close(tensor.double(), exact, rtol=0.51 * epsilon, atol=2 * epsilon * largest)


def test_one_bf16_adapter_gives_the_correctly_rounded_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(256, 256, bias=False).to(torch.bfloat16)
    down, up = (torch.randn(shape, generator=generator).mul(0.02).bfloat16() for shape in ((16, 256), (256, 16)))
    base = layer.weight.detach().clone()
    Merger({"transformer": layer}).merge([(Factors({"transformer": {"weight": LowRank(down, up, 1.0)}}), 1.0, ALL)])

    exact = (base.double() + up.double() @ down.double()).to(torch.bfloat16)
    assert (layer.weight == exact).float().mean() > 0.9999  # fp32 sums may fall on the other side of a tie


def test_restoring_gives_back_every_bit(model: dict[str, nn.Module], merger: Merger) -> None:
    before = bits(model)
    merger.merge([(factors(model, ADAPTERS["attention"]), 1.0, ALL)])
    assert any(not torch.equal(a, b) for a, b in zip(bits(model).values(), before.values(), strict=True))
    merger.restore()
    assert_same_bits(model, before)


class Injected(Exception):
    pass


def failing_at(call: int) -> mock._patch:
    """Make the n-th product of a merge fail, as if out of memory."""
    calls = iter(range(1_000_000))
    original = torch.cat

    def cat(*args: object, **kwargs: object) -> torch.Tensor:
        if next(calls) == call:
            raise Injected
        return original(*args, **kwargs)  # type: ignore[arg-type]

    return mock.patch("torch.cat", cat)


@pytest.mark.parametrize("seed", range(3))
def test_no_sequence_of_merges_restores_and_failures_leaves_a_trace(
    seed: int, model: dict[str, nn.Module], merger: Merger
) -> None:
    adapters = {name: factors(model, layers, i) for i, (name, layers) in enumerate(ADAPTERS.items())}
    before = bits(model)
    chance = random.Random(seed)
    fresh: dict[tuple, dict[str, torch.Tensor]] = {}
    for _ in range(12):
        names = tuple(chance.sample(sorted(adapters), chance.randint(0, 3)))
        target = chance.choice([ALL, ("transformer",), ("transformer_2", "critic")])
        composition = [(adapters[name], 0.7, target) for name in names]
        action = chance.choice(["merge", "merge", "restore", "fail"])
        if action == "restore":
            merger.restore()
            assert_same_bits(model, before)
        elif action == "fail":
            with failing_at(chance.randint(0, 6)):
                try:
                    merger.merge(composition)
                except Injected:
                    assert_same_bits(model, before)
        else:
            merger.merge(composition)
            # The weights depend only on what is merged, not on what was merged before.
            now = bits(model)
            known = fresh.setdefault((names, target), now)
            assert all(torch.equal(now[key], known[key]) for key in now)
    merger.release()
    assert_same_bits(model, before)
    assert merger.num_bytes_held == 0


def test_a_failure_midway_leaves_the_base_weights(model: dict[str, nn.Module], merger: Merger) -> None:
    before = bits(model)
    merger.merge([(factors(model, ADAPTERS["overlapping"]), 1.0, ALL)])
    with failing_at(9), pytest.raises(Injected):
        merger.merge([(factors(model, ADAPTERS["attention"]), 1.0, ALL)])
    assert_same_bits(model, before)


def test_weights_that_cannot_be_restored_are_known_to_be_wrong(model: dict[str, nn.Module], merger: Merger) -> None:
    before = bits(model)
    with failing_at(9), mock.patch.object(merger._originals, "read", side_effect=Injected), pytest.raises(Injected):
        merger.merge([(factors(model, ADAPTERS["attention"]), 1.0, ALL)])
    assert merger.holds_a_merge
    merger.restore()
    assert not merger.holds_a_merge
    assert_same_bits(model, before)


@pytest.mark.parametrize(
    ("parameter", "update"),
    [
        ("blocks.0.attn1.to_q.weight", LowRank(torch.ones(2, 95), torch.ones(96, 2), 1.0)),
        ("blocks.0.attn1.to_q.bias", Delta(torch.ones(95))),
        ("blocks.9.attn1.to_q.weight", LowRank(torch.ones(2, 96), torch.ones(96, 2), 1.0)),
    ],
)
def test_a_misfit_is_refused_before_anything_changes(
    parameter: str, update: Update, model: dict[str, nn.Module]
) -> None:
    merger = Merger(model)
    merger.merge([(factors(model, ADAPTERS["attention"]), 1.0, ALL)])
    merged = bits(model)
    good = factors(model, ADAPTERS["feed-forward"])
    with pytest.raises(ValueError, match=parameter.replace(".", r"\.")):
        merger.merge([(good, 1.0, ALL), (Factors({"transformer": {parameter: update}}), 1.0, ALL)])
    assert_same_bits(model, merged)


def test_modules_parameters_and_storage_stay_the_same_objects(model: dict[str, nn.Module], merger: Merger) -> None:
    def identities() -> list[tuple[int, int]]:
        parameters = [p for module in model.values() for p in module.parameters()]
        return [(id(p), p.data_ptr()) for p in parameters] + [(id(m), 0) for t in model.values() for m in t.modules()]

    before = identities()
    merger.merge([(factors(model, ADAPTERS["attention"]), 1.0, ALL)])
    assert identities() == before
    merger.restore()
    assert identities() == before


def test_a_target_names_the_experts_and_others_are_ignored(model: dict[str, nn.Module]) -> None:
    before = bits(model)
    merger = Merger(model)
    adapter = factors(model, ADAPTERS["attention"])
    merger.merge([(adapter, 1.0, ("transformer_2", "critic"))])
    changed = {name.partition(".")[0] for name, now in bits(model).items() if not torch.equal(now, before[name])}
    assert changed == {"transformer_2"}
    merger.merge([(adapter, 1.0, ("critic",))])
    assert_same_bits(model, before)


def test_strength_zero_touches_nothing(model: dict[str, nn.Module]) -> None:
    merger = Merger(model)
    merger.merge([(factors(model, ADAPTERS["attention"]), 0.0, ALL)])
    assert merger.num_bytes_held == 0


def test_what_is_held_is_what_was_touched(model: dict[str, nn.Module]) -> None:
    merger = Merger(model)
    attention, overlapping = (factors(model, ADAPTERS[name]) for name in ("attention", "overlapping"))
    for adapter in (attention, overlapping):
        merger.merge([(adapter, 1.0, ALL)])
    names = attention.updates["transformer"].keys() | overlapping.updates["transformer"].keys()
    touched = [module.get_parameter(name) for module in model.values() for name in names]
    assert merger.num_bytes_held == sum(parameter.nbytes for parameter in touched)


def test_restoring_writes_only_what_the_merge_touched(model: dict[str, nn.Module]) -> None:
    merger = Merger(model)
    for name in ("feed-forward", "attention"):
        merger.merge([(factors(model, ADAPTERS[name]), 1.0, ALL)])
    touched = factors(model, ADAPTERS["attention"]).updates["transformer"]
    with mock.patch.object(merger, "_parameter", wraps=merger._parameter) as written:
        merger.restore()
    assert {parameter for ((_, parameter),) in (call.args for call in written.call_args_list)} == set(touched)


def test_a_block_of_bytes_gives_the_same_factors_without_copying(model: dict[str, nn.Module]) -> None:
    adapter = factors(model, ADAPTERS["convolution"])
    block = adapter.to_bytes()
    view = Factors.from_bytes(memoryview(block))

    assert (view.rank, view.num_bytes, view.transformers) == (adapter.rank, adapter.num_bytes, adapter.transformers)
    assert view.updates["transformer"] is view.updates["transformer_2"]
    first = torch.frombuffer(memoryview(block), dtype=torch.uint8).data_ptr()
    for name, update in adapter.updates["transformer"].items():
        other = view.updates["transformer"][name]
        assert other.scale == update.scale
        tensors = ("delta",) if isinstance(update, Delta) else ("down", "up")
        for part in tensors:
            assert torch.equal(getattr(other, part), getattr(update, part))
            assert first <= getattr(other, part).data_ptr() < first + len(block)
    assert len(block) < adapter.num_bytes + 4096
