"""Two engine replicas that were started with an adapter: they agree, both get what is set later, and each stands in for
the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest

from tests.chaos.victims import lose
from tests.e2e.server import ANSWER_SECONDS, FLOAT32, SMALL, Server, running_server

SEED = {"seed": 7}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory, adapters: tuple[str, str]) -> Iterator[Server]:
    flags = ("--dp-size", "2", "--num-gpus", "2", "--lora-path", adapters[0], *FLOAT32)
    with running_server(tmp_path_factory.mktemp("replicas"), *flags) as running:
        yield running


@pytest.fixture
def as_started(replicas: Server, adapters: tuple[str, str]) -> Iterator[None]:
    yield
    replicas.http.post("/v1/unmerge_lora_weights")
    body = {"lora_nickname": "default", "lora_path": adapters[0]}
    assert replicas.http.post("/v1/set_lora", json=body).status_code == 200


def merged(server: Server) -> list[list[str]]:
    """Nicknames of the adapters in each replica's weights."""
    listed = server.http.get("/v1/list_loras").json()["replicas"]
    return [[adapter["nickname"] for adapter in replica] for replica in listed.values()]


def pictures(server: Server, count: int = 8) -> list[bytes]:
    """The same image several times at once, so that both replicas have work."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: server.picture(**SEED), range(count)))


def test_the_adapter_of_the_command_line_is_merged_on_both(replicas: Server, server: Server) -> None:
    assert merged(replicas) == [["default"], ["default"]]
    assert replicas.picture(**SEED) != server.picture(**SEED)
    assert replicas.picture(**SEED, lora=[]) == server.picture(**SEED)


def test_both_make_the_same_pictures(replicas: Server) -> None:
    assert len(set(pictures(replicas))) == 1


@pytest.mark.usefixtures("as_started")
def test_another_adapter_reaches_both(replicas: Server, server: Server, adapters: tuple[str, str]) -> None:
    with_first = replicas.picture(**SEED)
    assert replicas.http.post("/v1/unmerge_lora_weights").status_code == 200
    assert merged(replicas) == [[], []]
    assert set(pictures(replicas)) == {server.picture(**SEED)}
    body = {"lora_nickname": "second", "lora_path": adapters[1]}
    assert replicas.http.post("/v1/set_lora", json=body).status_code == 200
    assert merged(replicas) == [["second"], ["second"]]
    (with_second,) = set(pictures(replicas))
    assert with_second not in (with_first, server.picture(**SEED))


def test_pictures_that_a_lost_replica_had_begun_are_made_by_the_other(replicas: Server) -> None:
    request = {**SMALL, **SEED, "num_inference_steps": 40, "stream": True}
    undisturbed = streamed(replicas, request)
    begun = Barrier(3)
    with ThreadPoolExecutor(2) as clients:
        streams = [clients.submit(streamed, replicas, request, begun) for _ in range(2)]
        begun.wait(ANSWER_SECONDS)
        assert lose(replicas, "engine replica")
        assert [stream.result() for stream in streams] == [undisturbed] * 2


def streamed(server: Server, request: dict[str, Any], begun: Barrier | None = None) -> str:
    """The data of a streamed image; after its first line, it waits at `begun` for the others."""
    with server.http.stream("POST", "/v1/images/generations", json=request) as answer:
        lines = answer.iter_lines()
        next(lines)
        if begun:
            begun.wait(ANSWER_SECONDS)
        (data,) = [line for line in lines if line.startswith("data:")]
    return json.loads(data.removeprefix("data:"))["b64_json"]
