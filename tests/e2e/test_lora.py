"""Adapters over HTTP: what SGLang's documents show with curl, and the effect on the pixels."""

from __future__ import annotations

import json
import subprocess
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.e2e.server import SMALL, Server
from tests.lora.adapters import Trained

SEED = {"seed": 7}


@pytest.fixture(autouse=True)
def nothing_merged(server: Server) -> Iterator[None]:
    yield
    assert server.http.post("/v1/unmerge_lora_weights").status_code == 200


def merged(server: Server) -> list[str]:
    """Nicknames of the adapters in the one replica's weights."""
    (replica,) = server.http.get("/v1/list_loras").json()["replicas"].values()
    return [adapter["nickname"] for adapter in replica]


def curl(command: str, server: Server, adapters: tuple[str, str]) -> dict[str, Any]:
    """Run a command from SGLang's documents against `server`, with the paths of real adapters."""
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
    (active,) = listing["active"]["transformer"]
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


def test_an_adapter_is_deleted_unless_it_is_merged(server: Server, adapters: tuple[str, str]) -> None:
    base = server.picture(**SEED)
    body = {"lora_nickname": "passing", "lora_path": adapters[0]}
    assert server.http.post("/v1/set_lora", json=body).status_code == 200
    with_it = server.picture(**SEED)
    refused = server.http.delete("/v1/loras/passing")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "lora_merged")
    assert server.picture(**SEED) == with_it

    assert server.http.post("/v1/unmerge_lora_weights").status_code == 200
    accepted = server.create_video(**SEED, lora="passing", num_inference_steps=20)["id"]
    deleted = server.http.delete("/v1/loras/passing")
    assert deleted.status_code == 200, deleted.text
    assert "passing" not in [adapter["nickname"] for adapter in deleted.json()["loaded_adapters"]]
    for answer in (
        server.http.delete("/v1/loras/passing"),
        server.http.post("/v1/set_lora", json={"lora_nickname": "passing"}),
        server.http.post("/v1/images/generations", json={**SMALL, "lora": "passing"}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "lora_not_found")
    assert server.wait_for_video(accepted)["status"] == "completed"
    assert server.picture(**SEED) == base
    assert server.http.post("/v1/merge_lora_weights").status_code == 400


def test_an_adapter_that_was_named_by_its_path_is_deleted_by_it(server: Server, adapters: tuple[str, str]) -> None:
    server.picture(lora={"path": adapters[0]}, **SEED)
    assert server.http.delete(f"/v1/loras/{quote(adapters[0], safe='')}").status_code == 200
    assert server.http.delete(f"/v1/loras/{adapters[0]}").status_code == 404
