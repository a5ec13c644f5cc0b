"""Adapters for a model of two experts: one file for both, one for each, and what is reported of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.e2e.conftest import TWO_EXPERTS
from tests.e2e.server import Server
from tests.lora.adapters import save, train, with_prefix

SEED = {"seed": 7}
BOTH = ("transformer", "transformer_2")


@pytest.fixture(autouse=True)
def nothing_merged(gang_of_two: Server) -> Iterator[None]:
    yield
    assert gang_of_two.http.post("/v1/unmerge_lora_weights").status_code == 200


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An adapter per noise level as trainers save it, without an expert's name; named, both in one file; low alone."""
    folder = tmp_path_factory.mktemp("adapters")
    pipeline = tiny_models.build(TWO_EXPERTS)
    high, low = (
        train(pipeline.components[name], ["to_q", "to_v", "ffn.net.2"], seed=seed).state
        for seed, name in enumerate(BOTH)
    )
    states = {
        "high": with_prefix("transformer.", high),
        "low": with_prefix("transformer.", low),
        "both": {**with_prefix("transformer.", high), **with_prefix("transformer_2.", low)},
        "low alone": with_prefix("transformer_2.", low),
    }
    return {name: str(save(state, Path(folder, f"{name}.safetensors"))) for name, state in states.items()}


def set_lora(server: Server, files: dict[str, str], *names: str, **fields: Any) -> dict[str, Any]:
    body = {"lora_nickname": list(names), "lora_path": [files[name] for name in names], **fields}
    answer = server.http.post("/v1/set_lora", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def active(listing: dict[str, Any]) -> dict[str, tuple[list[str], bool]]:
    return {name: (entry["nicknames"], entry["merged"]) for name, (entry,) in listing["active"].items()}


def test_one_file_goes_to_both_experts_and_is_told_for_both(gang_of_two: Server, files: dict[str, str]) -> None:
    base = gang_of_two.picture(**SEED)
    assert active(set_lora(gang_of_two, files, "high")) == dict.fromkeys(BOTH, (["high"], True))
    on_both = gang_of_two.picture(**SEED)
    listing = gang_of_two.http.post("/v1/unmerge_lora_weights", json={"target": "transformer"}).json()
    assert active(listing) == {"transformer": (["high"], False), "transformer_2": (["high"], True)}
    assert len({base, on_both, gang_of_two.picture(**SEED)}) == 3


def test_a_file_for_each_noise_level_is_the_same_as_both_in_one(gang_of_two: Server, files: dict[str, str]) -> None:
    listing = set_lora(gang_of_two, files, "high", "low", target=list(BOTH))
    assert active(listing) == {"transformer": (["high"], True), "transformer_2": (["low"], True)}
    each_its_own = gang_of_two.picture(**SEED)
    assert gang_of_two.picture(**SEED, lora={"path": files["both"]}) == each_its_own
    own = [{"nickname": name, "target": target} for name, target in zip(("high", "low"), BOTH, strict=True)]
    assert gang_of_two.picture(**SEED, lora=own) == each_its_own


def test_a_file_that_names_one_expert_is_active_there_alone(gang_of_two: Server, files: dict[str, str]) -> None:
    assert active(set_lora(gang_of_two, files, "low alone")) == {"transformer_2": (["low alone"], True)}


def test_targets_that_the_model_lacks_are_ignored_and_named(gang_of_two: Server, files: dict[str, str]) -> None:
    listing = set_lora(gang_of_two, files, "high", target=["transformer", "critic"])
    assert active(listing) == {"transformer": (["high"], True)}
    assert "target 'critic' is ignored: there is only transformer, transformer_2" in listing["message"]
