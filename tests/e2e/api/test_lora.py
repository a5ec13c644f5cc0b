"""The adapter routes, as SGLang's clients use them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.server import Server


@pytest.fixture(autouse=True)
def nothing_merged(server: Server) -> Iterator[None]:
    yield
    server.http.post("/v1/unmerge_lora_weights")


def set_lora(server: Server, **fields: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/set_lora", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def merged(server: Server) -> list[tuple[str, float, list[str]]]:
    (replica,) = server.http.get("/v1/list_loras").json()["replicas"].values()
    return [(adapter["nickname"], adapter["strength"], adapter["target"]) for adapter in replica]


def test_an_adapter_is_set_unmerged_and_merged_again_at_its_strength(server: Server, adapters: tuple[str, str]) -> None:
    answer = set_lora(server, lora_nickname="a", lora_path=adapters[0], strength=0.5)
    assert answer["status"] == "ok"
    assert answer["message"] == "Successfully set LoRA adapter(s): a (target: all, strength: 0.50)"
    assert merged(server) == [("a", 0.5, ["all"])]
    assert server.http.post("/v1/unmerge_lora_weights").json()["status"] == "ok"
    assert merged(server) == []
    assert server.http.post("/v1/merge_lora_weights").json()["status"] == "ok"
    assert merged(server) == [("a", 0.5, ["all"])]
    server.http.post("/v1/unmerge_lora_weights")
    server.http.post("/v1/merge_lora_weights", json={"strength": 0.25})
    assert merged(server) == [("a", 0.25, ["all"])]


def test_a_loaded_nickname_needs_no_path(server: Server, adapters: tuple[str, str]) -> None:
    set_lora(server, lora_nickname="a", lora_path=adapters[0])
    server.http.post("/v1/unmerge_lora_weights")
    set_lora(server, lora_nickname="a")
    set_lora(server, lora_nickname="a", lora_path=None, target=None, merge_mode="merge")


def test_curl_without_a_content_type_and_without_a_body(server: Server, adapters: tuple[str, str]) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    body = f'{{"lora_nickname": "a", "lora_path": "{adapters[0]}"}}'
    assert server.http.post("/v1/set_lora", content=body, headers=form).status_code == 200
    for route in ("/v1/unmerge_lora_weights", "/v1/merge_lora_weights"):
        assert server.http.post(route, headers=form).status_code == 200


def test_lists_make_one_composition(server: Server, adapters: tuple[str, str]) -> None:
    set_lora(server, lora_nickname=["a", "b"], lora_path=list(adapters), strength=[0.5, 0.25], target="transformer")
    assert merged(server) == [("a", 0.5, ["transformer"]), ("b", 0.25, ["transformer"])]
    set_lora(server, lora_nickname=["a", "b"], strength=0.75, target=["transformer", "transformer_2"])
    assert merged(server) == [("a", 0.75, ["transformer"]), ("b", 0.75, ["transformer_2"])]


def test_the_list_has_the_shape_of_sglangs(server: Server, adapters: tuple[str, str]) -> None:
    set_lora(server, lora_nickname="a", lora_path=adapters[0], strength=0.5)
    server.http.post("/v1/unmerge_lora_weights")
    listing = server.http.get("/v1/list_loras").json()
    assert {"nickname": "a", "path": adapters[0]}.items() <= next(
        adapter for adapter in listing["loaded_adapters"] if adapter["nickname"] == "a"
    ).items()
    assert listing["active"]["transformer"] == [
        {
            "nickname": "a",
            "nicknames": ["a"],
            "path": adapters[0],
            "merged": False,
            "mode": "unmerged",
            "strength": 0.5,
            "strengths": [0.5],
        }
    ]
    merged_again = server.http.post("/v1/merge_lora_weights", json={"strength": 0.25}).json()
    assert "a (target: all, strength: 0.25)" in merged_again["message"]
    (entry,) = merged_again["active"]["transformer"]
    assert (entry["merged"], entry["mode"], entry["strength"]) == (True, "merged", 0.25)


def test_a_second_adapter_is_a_conflict_that_clients_do_not_repeat(server: Server, adapters: tuple[str, str]) -> None:
    set_lora(server, lora_nickname="a", lora_path=adapters[0])
    answer = server.http.post("/v1/set_lora", json={"lora_nickname": "b", "lora_path": adapters[1]})
    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    assert "unmerge_lora_weights" in answer.json()["error"]["message"]
    assert merged(server) == [("a", 1.0, ["all"])]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "lora_nickname"),
        ({"lora_nickname": ""}, "lora_nickname"),
        ({"lora_nickname": []}, "lora_nickname"),
        ({"lora_nickname": 5}, "lora_nickname"),
        ({"lora_nickname": "a", "strength": "much"}, "strength"),
        ({"lora_nickname": "a", "strength": True}, "strength"),
        ({"lora_nickname": ["a", "b"], "strength": [1, 2, 3]}, "strength"),
        ({"lora_nickname": ["a", "b"], "lora_path": "one"}, "lora_path"),
        ({"lora_nickname": ["a", "b"], "target": ["x", "y", "z"]}, "target"),
        ({"lora_nickname": "a", "lora_alpha": 8}, "lora_alpha"),
        ({"lora_nickname": "a", "merge_mode": "dynamic"}, "merge_mode"),
    ],
)
def test_a_wrong_field_is_named(server: Server, body: dict[str, Any], param: str) -> None:
    answer = server.http.post("/v1/set_lora", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_an_adapter_that_is_not_there_leaves_the_merged_one(server: Server, adapters: tuple[str, str]) -> None:
    set_lora(server, lora_nickname="a", lora_path=adapters[0])
    answer = server.http.post("/v1/set_lora", json={"lora_nickname": "nowhere", "lora_path": "/no/such.safetensors"})
    assert 400 <= answer.status_code < 500
    assert merged(server) == [("a", 1.0, ["all"])]
