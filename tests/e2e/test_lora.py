"""Adapters over HTTP: what SGLang's documents show with curl, and what becomes of the pixels."""

from __future__ import annotations

import json
import subprocess
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.server import SMALL, Server
from tests.lora.adapters import Trained, save

SEED = {"seed": 7}


@pytest.fixture(autouse=True)
def nothing_merged(server: Server) -> Iterator[None]:
    yield
    assert server.http.post("/v1/unmerge_lora_weights").status_code == 200


def merged(server: Server) -> list[str]:
    """Nicknames in the weights of the one replica."""
    (replica,) = server.http.get("/v1/list_loras").json()["replicas"].values()
    return [adapter["nickname"] for adapter in replica]


def curl(command: str, server: Server, adapters: tuple[str, str]) -> dict[str, Any]:
    """Run a command of SGLang's documents against `server`, with the paths of real adapters."""
    command = command.replace("http://localhost:30010", server.base_url)
    for documented, path in zip(("path/to/A", "path/to/B"), adapters, strict=True):
        command = command.replace(documented, path)
    return json.loads(subprocess.run(["bash", "-c", command], check=True, capture_output=True, timeout=120).stdout)


SET_A = """curl -X POST http://localhost:30010/v1/set_lora -d '{"lora_nickname": "lora_a", "lora_path": "path/to/A"}'"""
UNMERGE = """curl -X POST http://localhost:30010/v1/unmerge_lora_weights"""
SET_B = """curl -X POST http://localhost:30010/v1/set_lora -d '{"lora_nickname": "lora_b", "lora_path": "path/to/B"}'"""


def test_the_example_of_switching_adapters_gives_three_different_pictures(
    server: Server, adapters: tuple[str, str]
) -> None:
    base = server.picture(**SEED)
    assert curl(SET_A, server, adapters)["status"] == "ok"
    assert merged(server) == ["lora_a"]
    with_a = server.picture(**SEED)

    assert curl(UNMERGE, server, adapters)["status"] == "ok"
    assert merged(server) == []
    assert server.picture(**SEED) == base

    assert curl(SET_B, server, adapters)["status"] == "ok"
    assert merged(server) == ["lora_b"]
    with_b = server.picture(**SEED)
    assert len({base, with_a, with_b}) == 3

    curl(UNMERGE, server, adapters)
    assert server.picture(**SEED) == base
    again = curl(
        """curl -X POST http://localhost:30010/v1/set_lora -d '{"lora_nickname": "lora_a"}'""", server, adapters
    )
    assert again["status"] == "ok"
    assert server.picture(**SEED) == with_a


def test_merging_again_gives_the_same_pixels(server: Server, adapters: tuple[str, str]) -> None:
    curl(SET_A, server, adapters)
    with_a = server.picture(**SEED)
    curl(UNMERGE, server, adapters)
    curl("curl -X POST http://localhost:30010/v1/merge_lora_weights", server, adapters)
    assert server.picture(**SEED) == with_a


def test_a_second_adapter_is_refused_with_the_call_to_make(server: Server, adapters: tuple[str, str]) -> None:
    curl(SET_A, server, adapters)
    with_a = server.picture(**SEED)
    answer = server.http.post("/v1/set_lora", json={"lora_nickname": "lora_b", "lora_path": adapters[1]})
    assert answer.status_code == 409
    assert "'lora_a' is merged. Call POST /v1/unmerge_lora_weights first" in answer.json()["error"]["message"]
    assert server.picture(**SEED) == with_a


def test_the_list_tells_what_is_loaded_and_what_is_merged_where(server: Server, adapters: tuple[str, str]) -> None:
    set_ = curl(SET_A, server, adapters)
    listing = server.http.get("/v1/list_loras").json()
    (entry,) = (adapter for adapter in listing["loaded_adapters"] if adapter["nickname"] == "lora_a")
    assert (entry["path"], entry["rank"]) == (adapters[0], 4)
    assert entry["num_bytes"] > 0
    active = listing["active"]["transformer"]
    assert (active["nickname"], active["merged"]) == ("lora_a", True)
    assert list(listing["replicas"].values()) == [[{"nickname": "lora_a", "strength": 1.0, "target": ["all"]}]]
    assert set_["replicas"] == listing["replicas"]


def test_a_request_has_its_own_adapter_whatever_is_merged(server: Server, adapters: tuple[str, str]) -> None:
    base = server.picture(**SEED)
    curl(SET_A, server, adapters)
    with_a = server.picture(**SEED)
    curl(UNMERGE, server, adapters)
    curl(SET_B, server, adapters)
    with_b = server.picture(**SEED)

    body = {**SMALL, **SEED, "lora": "lora_a"}
    answer = server.openai().images.generate(prompt=body.pop("prompt"), size=body.pop("size"), extra_body=body)
    assert b64decode(answer.data[0].b64_json or "") == with_a
    assert server.picture(lora="lora_a", **SEED) == with_a
    assert server.picture(lora={"path": adapters[0]}, **SEED) == with_a
    assert server.picture(lora=[], **SEED) == base
    assert server.picture(lora={"nickname": "lora_a", "strength": 0.5}, **SEED) not in (base, with_a)
    assert server.picture(lora=["lora_a", "lora_b"], **SEED) not in (base, with_a, with_b)
    assert server.picture(**SEED) == with_b


def test_a_folder_that_peft_saved_is_the_same_adapter_as_the_file(
    server: Server, adapters: tuple[str, str], trained: list[Trained], tmp_path: Path
) -> None:
    trained[1].peft_model.save_pretrained(tmp_path / "saved")
    assert server.picture(lora={"path": str(tmp_path / "saved")}, **SEED) == server.picture(
        lora={"path": adapters[1]}, **SEED
    )


@pytest.fixture
def bad_adapters(tmp_path: Path, adapters: tuple[str, str]) -> dict[str, Path]:
    """Files that are no adapter for the model, by what is wrong with them."""
    layer = "transformer.blocks.0.attn1.to_q"
    good = {f"{layer}.lora_A.weight": torch.ones(2, 96), f"{layer}.lora_B.weight": torch.ones(96, 2)}
    elsewhere = "transformer.single_transformer_blocks.0.attn.to_q"
    (tmp_path / "text.safetensors").write_text("this is no safetensors file")
    (tmp_path / "cut.safetensors").write_bytes(Path(adapters[0]).read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    return {
        "missing": tmp_path / "missing.safetensors",
        "an empty folder": tmp_path / "empty",
        "text": tmp_path / "text.safetensors",
        "cut short": tmp_path / "cut.safetensors",
        "another width": save({k: v.repeat(2, 2) for k, v in good.items()}, tmp_path / "wide.safetensors"),
        "another architecture": save(
            {k.replace(layer, elsewhere): v for k, v in good.items()}, tmp_path / "flux.safetensors"
        ),
        "partly fitting": save(
            {**good, **{k.replace("blocks.0", "blocks.99"): v for k, v in good.items()}},
            tmp_path / "partly.safetensors",
        ),
        "not finite": save({k: v * float("nan") for k, v in good.items()}, tmp_path / "nan.safetensors"),
    }


KINDS = (
    "missing",
    "an empty folder",
    "text",
    "cut short",
    "another width",
    "another architecture",
    "partly fitting",
    "not finite",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_adapter_is_refused_and_what_was_active_stays(
    server: Server, adapters: tuple[str, str], bad_adapters: dict[str, Path], kind: str
) -> None:
    curl(SET_A, server, adapters)
    with_a = server.picture(**SEED)
    curl(UNMERGE, server, adapters)
    base = server.picture(**SEED)
    path = str(bad_adapters[kind])

    answer = server.http.post("/v1/set_lora", json={"lora_nickname": f"bad {kind}", "lora_path": path})
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["param"] == "lora_path"
    assert server.picture(**SEED) == base

    curl(SET_A, server, adapters)
    again = server.http.post("/v1/set_lora", json={"lora_nickname": "lora_a", "lora_path": path})
    assert 400 <= again.status_code < 500
    own = server.http.post("/v1/images/generations", json={"prompt": "p", "lora": {"path": path}})
    assert 400 <= own.status_code < 500
    assert merged(server) == ["lora_a"]
    assert server.picture(**SEED) == with_a


def test_a_video_takes_the_adapter_that_was_merged_when_it_was_accepted(
    server: Server, adapters: tuple[str, str]
) -> None:
    base = server.clip(**SEED)
    curl(SET_A, server, adapters)
    accepted_with_a = server.create_video(**SEED)["id"]
    curl(UNMERGE, server, adapters)
    accepted_without = server.create_video(**SEED)["id"]
    contents = []
    for video_id in (accepted_with_a, accepted_without):
        assert server.wait_for_video(video_id)["status"] == "completed"
        contents.append(server.http.get(f"/v1/videos/{video_id}/content").content)
    assert contents[0] != base
    assert contents[1] == base
