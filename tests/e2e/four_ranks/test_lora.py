"""Adapters on four ranks (2x2), from one folder: every format, every fault, and what survives a rank's death."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from configs.server_args import ServerArgs
from pipelines.generation.generation import generate
from pipelines.job import Job, Result, Task
from pipelines.model.bundled import model_directory
from pipelines.model.load import load_model
from tests.e2e.pictures import pixels
from tests.e2e.server import SMALL, Server
from tests.lora.adapters import State, Trained, save, train, with_prefix
from tests.lora.formats import FORMATS, WAN_LAYERS

SEED = {"seed": 7, "guidance_scale": 1.0, "num_inference_steps": 1}
"""Of all images here. One step without guidance is one forward: four ranks on two cores take 0.2 s for it."""

WAN_FORMATS = {
    name: make for name, (family, layers, make) in FORMATS.items() if family == "wan2.1-t2v" and layers == WAN_LAYERS
}


@pytest.fixture(scope="module")
def trained() -> Trained:
    """Made by PEFT, for the bundled model."""
    transformer = WanTransformer3DModel.from_pretrained(model_directory() / "transformer")
    return train(transformer, WAN_LAYERS, r=4, lora_alpha=8)


@pytest.fixture(scope="module", autouse=True)
def saved(trained: Trained, folder: Path) -> None:
    """That adapter in every format, each in its own folder, and another adapter."""
    for name, make in WAN_FORMATS.items():
        save(make(trained), folder / name / "adapter.safetensors")
    trained.peft_model.save_pretrained(folder / "as PEFT saves it")
    other = train(WanTransformer3DModel.from_pretrained(model_directory() / "transformer"), ["to_k"], seed=1)
    save(with_prefix("transformer.", other.state), folder / "other.safetensors")


@pytest.fixture(autouse=True)
def nothing_merged(four_ranks: Server) -> Iterator[None]:
    yield
    assert four_ranks.http.post("/v1/unmerge_lora_weights").status_code == 200


@pytest.fixture(scope="module")
def base(four_ranks: Server) -> bytes:
    """The image without an adapter."""
    return four_ranks.picture(**SEED, lora=[])


def set_lora(server: Server, nickname: str, path: Any = None, **fields: Any) -> dict[str, Any]:
    body = {"lora_nickname": nickname, "lora_path": path, **fields}
    answer = server.http.post("/v1/set_lora", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def unmerge(server: Server) -> None:
    assert server.http.post("/v1/unmerge_lora_weights").status_code == 200


def merged(server: Server) -> list[str]:
    (replica,) = server.http.get("/v1/list_loras").json()["replicas"].values()
    return [adapter["nickname"] for adapter in replica]


def farthest(one: bytes, other: bytes) -> int:
    """The largest difference between the pixels of two images, out of 255."""
    return int(np.abs(pixels(one) - pixels(other)).max())


# Right.


@pytest.fixture(scope="module")
def fused(trained: Trained) -> bytes:
    """The image of a model into which PEFT itself merged the adapter, computed without a server."""
    model = load_model(ServerArgs(device="cpu", dtype="fp32"))
    model.transformers["transformer"].load_state_dict(trained.fused)
    defaults = model.card.family.defaults_for(Task.TEXT_TO_IMAGE).model_dump()
    small = {"width": 64, "height": 64, **{name: value for name, value in SEED.items() if name != "seed"}}
    job = Job(
        id="fused", task=Task.TEXT_TO_IMAGE, prompt=SMALL["prompt"], seeds=(SEED["seed"],), **{**defaults, **small}
    )
    *_, result = generate(model, job, {})
    assert isinstance(result, Result)
    return result.outputs[0].data


@pytest.mark.parametrize("format_name", [*WAN_FORMATS, "as PEFT saves it"])
def test_an_adapter_in_any_format_gives_the_picture_of_pefts_own_fused_model(
    four_ranks: Server, base: bytes, fused: bytes, format_name: str
) -> None:
    set_lora(four_ranks, f"style, {format_name}", format_name)
    picture = four_ranks.picture(**SEED)
    assert farthest(picture, fused) <= 1
    assert farthest(picture, base) > 20
    unmerge(four_ranks)
    assert four_ranks.picture(**SEED) == base


def test_requests_that_come_at_once_with_different_adapters_never_mix(four_ranks: Server, base: bytes) -> None:
    choices: list[Any] = ["first", "second", {"nickname": "first", "strength": 0.5}, ["first", "second"], []]
    set_lora(four_ranks, "first", "as PEFT saves it")
    alone = [four_ranks.picture(**SEED)]
    unmerge(four_ranks)
    set_lora(four_ranks, "second", "other.safetensors")
    alone.append(four_ranks.picture(**SEED))
    unmerge(four_ranks)
    set_lora(four_ranks, "first", strength=0.5)
    alone.append(four_ranks.picture(**SEED))
    unmerge(four_ranks)
    set_lora(four_ranks, ["first", "second"])  # type: ignore[arg-type]
    alone.append(four_ranks.picture(**SEED))
    alone.append(base)
    assert len(set(alone)) == len(choices)
    with ThreadPoolExecutor(15) as pool:
        together = list(pool.map(lambda choice: four_ranks.picture(**SEED, lora=choice), choices * 3))
    assert together == alone * 3


def test_a_restore_from_the_checkpoint_holds_no_memory(four_ranks: Server) -> None:
    listing = set_lora(four_ranks, "first", "as PEFT saves it")
    assert list(listing["num_bytes_held"].values()) == [0]


# Wrong.


SHAPE = WanTransformer3DModel.load_config(model_directory() / "transformer")
WIDTH = SHAPE["num_attention_heads"] * SHAPE["attention_head_dim"]


def of(width: int = WIDTH, **layers: str) -> State:
    """A LoRA of ones for layers of any name."""
    return {
        f"{layer}.lora_{half}.weight": torch.ones(shape)
        for layer in layers.values()
        for half, shape in (("A", (2, width)), ("B", (width, 2)))
    }


GOOD = "transformer.blocks.0.attn1.to_q"

MADE: dict[str, State] = {
    "not a LoRA": {"transformer.blocks.0.attn1.to_q.weight": torch.ones(WIDTH, WIDTH)},
    "another architecture": of(layer="transformer.single_transformer_blocks.0.attn.to_q"),
    "another width": of(2 * WIDTH, layer=GOOD),
    "deeper": of(layer=GOOD, deep="transformer.blocks.70.attn1.to_q"),
    "partly matching": of(layer=GOOD, unheard="transformer.unheard.of"),
    "matching nowhere": of(unheard="transformer.unheard.of"),
    "half a pair": {f"{GOOD}.lora_A.weight": torch.ones(2, WIDTH)},
    "NaN": {name: tensor * float("nan") for name, tensor in of(layer=GOOD).items()},
}

REASONS = {
    "missing": "does not exist",
    "text": "can't be read as safetensors",
    "truncated": "is truncated",
    "a pickle": "is a pickle",
    "an empty folder": "has no safetensors file",
    "not a LoRA": "is not a LoRA",
    "another architecture": "is for another model: no layer matches this one (single_transformer_blocks.0",
    "another width": "is for a model of another width: blocks.0.attn1.to_q.weight is "
    f"{WIDTH}x{WIDTH} here, {2 * WIDTH}x{2 * WIDTH} in the LoRA",
    "deeper": "is for a deeper model: 2 of 4 keys name blocks that this one has not (blocks.70.attn1.to_q",
    "partly matching": "matches only in part: 2 of 4 keys match no layer (unheard.of.lora_A.weight",
    "matching nowhere": "no layer matches this one (unheard.of.lora_A.weight",
    "half a pair": "is incomplete: blocks.0.attn1.to_q has only lora_A",
    "NaN": "has NaN or infinite values",
    "../outside.safetensors": "lies outside of this server's folder of adapters",
    "link": "lies outside of this server's folder of adapters",
    "someone/style": "does not exist in this server's folder of adapters, and it takes adapters from nowhere else",
}
"""By path below the server's folder; most paths are named after what is wrong."""


@pytest.fixture(scope="module")
def faults(saved: None, folder: Path) -> None:
    for name, state in MADE.items():
        save(state, folder / name / "adapter.safetensors")
    whole = (folder / "other.safetensors").read_bytes()
    (folder.parent / "outside.safetensors").write_bytes(whole)
    (folder / "link").symlink_to(folder.parent / "outside.safetensors")
    for name, content in {"text": b"this is no safetensors file", "truncated": whole[:-100]}.items():
        (folder / name).mkdir()
        (folder / name / "adapter.safetensors").write_bytes(content)
    (folder / "a pickle").mkdir()
    torch.save({}, folder / "a pickle" / "adapter.pt")
    (folder / "an empty folder").mkdir()


@pytest.fixture(scope="module")
def with_good(four_ranks: Server) -> bytes:
    """The image with a good adapter."""
    return four_ranks.picture(**SEED, lora={"nickname": "good", "path": "as PEFT saves it"})


@pytest.mark.parametrize("path", REASONS)
@pytest.mark.usefixtures("faults")
def test_a_bad_adapter_is_refused_with_its_reason_and_what_was_active_stays_exact(
    four_ranks: Server, base: bytes, with_good: bytes, path: str
) -> None:
    named = "a pickle/adapter.pt" if path == "a pickle" else path
    set_lora(four_ranks, "good", "as PEFT saves it")
    before = four_ranks.http.get("/v1/list_loras").json()

    # As new weights for the merged adapter, and as part of a request's own composition.
    bodies = {
        "/v1/set_lora": {"lora_nickname": "good", "lora_path": named},
        "/v1/images/generations": {**SMALL, "lora": ["good", {"nickname": "bad", "path": named}]},
    }
    for route, body in bodies.items():
        answer = four_ranks.http.post(route, json=body)
        assert answer.status_code in (400, 409), answer.text
    assert four_ranks.http.get("/v1/list_loras").json() == before
    assert four_ranks.picture(**SEED) == with_good

    unmerge(four_ranks)
    answer = four_ranks.http.post(
        "/v1/set_lora", json={"lora_nickname": ["good", "bad"], "lora_path": ["as PEFT saves it", named]}
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "lora_path", "invalid_lora")
    assert REASONS[path] in error["message"]
    assert f"'{named}'" in error["message"]
    assert merged(four_ranks) == []
    assert four_ranks.picture(**SEED) == base


def test_a_nickname_that_stands_for_another_file_is_a_conflict(four_ranks: Server) -> None:
    set_lora(four_ranks, "mine", "other.safetensors")
    with_mine = four_ranks.picture(**SEED)
    bodies = {
        "/v1/set_lora": {"lora_nickname": "mine", "lora_path": "as PEFT saves it"},
        "/v1/images/generations": {**SMALL, "lora": {"nickname": "mine", "path": "as PEFT saves it"}},
    }
    for route, body in bodies.items():
        answer = four_ranks.http.post(route, json=body)
        assert answer.status_code == 409
        assert "'mine' stands for another lora_path" in answer.json()["error"]["message"]
    assert four_ranks.picture(**SEED) == with_mine


# Changed.


def test_a_file_that_has_changed_is_loaded_again_and_the_answer_says_so(four_ranks: Server, folder: Path) -> None:
    file = folder / "changing.safetensors"
    shutil.copy(folder / "other.safetensors", file)
    set_lora(four_ranks, "changing", "changing.safetensors")
    first = four_ranks.picture(**SEED)
    unmerge(four_ranks)
    save({name: tensor * 2 for name, tensor in of(layer=GOOD).items()}, file)
    assert "the file of 'changing' has changed and was loaded again" in set_lora(four_ranks, "changing")["message"]
    assert four_ranks.picture(**SEED) != first
    assert "changed" not in set_lora(four_ranks, "changing")["message"]


# Ranks that die.


def test_adapters_outlive_the_ranks_and_their_files(four_ranks: Server, folder: Path, base: bytes) -> None:
    """A gang that loses a rank while idle is whole again for the next request."""
    shutil.copy(folder / "other.safetensors", folder / "gone.safetensors")
    set_lora(four_ranks, "kept", "gone.safetensors")
    with_kept = four_ranks.picture(**SEED)
    (folder / "gone.safetensors").unlink()
    four_ranks.ranks()[2].kill()
    assert four_ranks.picture(**SEED) == with_kept
    assert four_ranks.picture(**SEED, lora=[]) == base
    assert four_ranks.picture(**SEED, lora="kept") == with_kept
    assert four_ranks.http.get("/ready").status_code == 200


def test_a_rank_that_dies_while_an_adapter_is_set_leaves_no_rank_different_and_no_one_waiting(
    four_ranks: Server, base: bytes
) -> None:
    set_lora(four_ranks, "first", "as PEFT saves it")
    with_first = four_ranks.picture(**SEED)
    unmerge(four_ranks)
    victim = four_ranks.ranks()[3]
    with ThreadPoolExecutor(1) as pool:
        setting = pool.submit(
            httpx2.post, f"{four_ranks.base_url}/v1/set_lora", json={"lora_nickname": "first"}, timeout=120
        )
        time.sleep(0.02)
        victim.kill()
        answer = setting.result()
    assert answer.status_code in (200, 500, 503), answer.text
    assert four_ranks.picture(**SEED) == (with_first if answer.status_code == 200 else base)
    assert four_ranks.picture(**SEED, lora=[]) == base
    assert len(four_ranks.ranks()) == 4
