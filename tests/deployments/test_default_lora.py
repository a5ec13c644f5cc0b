"""The rules by which the default adapter of new jobs changes, with replicas that are tasks of this event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Literal

import pytest

from deployments.adapters import AdapterRegistry
from deployments.default_lora import DefaultLoRA
from deployments.errors import APIError
from deployments.interfaces import LoRARequest, LoRAStatus
from deployments.propagation import Composition, Merged, Propagation, follow
from tests.deployments.adapter_files import SIZE, AdapterFiles


class EngineReplica:
    """What an engine replica does with the default, with weights that are just the composition."""

    def __init__(self, registry: AdapterRegistry, default: DefaultLoRA, name: str):
        self.registry = registry
        self.weights: Composition = ()
        self.merges: list[Composition] = []
        self.fails_on: set[str] = set()
        self.busy = asyncio.Event()
        self.busy.set()
        self.task = asyncio.create_task(follow(default, name, self.merge))

    async def merge(self, composition: Composition) -> Merged:
        await self.busy.wait()
        for spec in composition:
            assert await self.registry.factors(spec.identity) == f"factors of {spec.identity}"
        if failing := self.fails_on & {spec.nickname for spec in composition}:
            return Merged(self.weights, f"no memory for {failing.pop()}")
        self.weights = composition
        self.merges.append(composition)
        return Merged(composition, num_bytes_held=7 * len(composition))

    async def die(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0)


class Server:
    """A registry, a default and its replicas, at a pace for tests."""

    def __init__(self, switch: Literal["refuse", "auto"] = "refuse", cache_bytes: int = 10 * SIZE):
        self.files = AdapterFiles()
        self.propagation = Propagation(poll_seconds=0.02, forget_seconds=0.1)
        self.registry = AdapterRegistry(lambda: self.files, cache_bytes=cache_bytes)
        self.default = DefaultLoRA(self.registry, switch=switch, propagation=self.propagation)
        self.replicas: list[EngineReplica] = []

    async def start(self, count: int) -> None:
        self.replicas += [EngineReplica(self.registry, self.default, f"replica-{i}") for i in range(count)]
        await until(lambda: len(self.propagation.replicas) == len(self.replicas))

    async def set(self, nickname: str, path: str | None = None, strength: float = 1.0) -> LoRAStatus:
        return await self.default.set_lora([LoRARequest(nickname, path, strength)])

    def job(self) -> list[tuple[str, str, float]]:
        """What a new job gets that names no adapters."""
        return [(spec.nickname, spec.identity, spec.strength) for spec in self.default.composition]

    async def restarted(self) -> Server:
        later = Server()
        snapshot = {**self.registry.snapshot(self.default.identities), **self.default.snapshot()}
        snapshot = json.loads(json.dumps(snapshot))
        later.registry.restore(snapshot)
        await later.default.restore(snapshot)
        return later


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    running = Server()
    await running.start(2)
    yield running
    for replica in running.replicas:
        await replica.die()


def nicknames(composition: Sequence) -> list[str]:
    return [spec.nickname for spec in composition]


def merged(status: LoRAStatus) -> list[str]:
    """The transformers that new jobs get an adapter in."""
    return [transformer for transformer, active in status.active.items() if active.merged]


# Setting, merging and unmerging.


async def test_set_lora_returns_when_every_replica_has_merged(server: Server) -> None:
    status = await server.set("style", "a", 0.7)
    assert [nicknames(replica.weights) for replica in server.replicas] == [["style"], ["style"]]
    assert merged(status) == ["transformer", "transformer_2"]
    assert {name: nicknames(specs) for name, specs in status.replicas.items()} == {
        "replica-0": ["style"],
        "replica-1": ["style"],
    }
    assert status.num_bytes_held == {"replica-0": 7, "replica-1": 7}
    assert server.job() == [("style", "a@1", 0.7)]


async def test_a_composition_is_one_default(server: Server) -> None:
    await server.default.set_lora([LoRARequest("style", "a", 0.6), LoRARequest("face", "b", 0.35)])
    assert server.job() == [("style", "a@1", 0.6), ("face", "b@1", 0.35)]
    assert server.replicas[0].merges == [(), server.replicas[0].weights]


async def test_setting_what_is_merged_again_changes_nothing(server: Server) -> None:
    await server.set("style", "a")
    await server.set("style", "a")
    await server.set("style")
    assert len(server.replicas[0].merges) == 2
    assert server.files.loads == ["a"]


async def test_the_strength_of_what_is_merged_can_be_set_anew(server: Server) -> None:
    await server.set("style", "a")
    await server.set("style", strength=0.5)
    assert server.job() == [("style", "a@1", 0.5)]


async def test_another_adapter_is_refused_while_one_is_merged(server: Server) -> None:
    await server.set("style", "a")
    with pytest.raises(APIError, match=r"LoRA 'style' is merged\. Call POST /v1/unmerge_lora_weights first") as refused:
        await server.set("face", "b")
    assert refused.value.status == 409
    assert refused.value.headers == {"x-should-retry": "false"}
    assert nicknames(server.default.status().set) == ["style"]
    assert server.files.loads == ["a"]


async def test_switching_is_automatic_when_so_configured() -> None:
    server = Server(switch="auto")
    await server.start(1)
    await server.set("style", "a")
    await server.set("face", "b")
    assert nicknames(server.replicas[0].weights) == ["face"]
    await server.set("face", "c")
    assert server.job() == [("face", "c@1", 1.0)]
    await server.replicas[0].die()


async def test_unmerge_then_merge_brings_back_the_strengths_that_were_set(server: Server) -> None:
    await server.default.set_lora([LoRARequest("style", "a", 0.6), LoRARequest("face", "b", 0.35)])
    status = await server.default.unmerge_lora()
    assert (merged(status), server.replicas[1].weights, server.job()) == ([], (), [])
    assert nicknames(status.set) == ["style", "face"]
    await server.default.merge_lora()
    assert server.job() == [("style", "a@1", 0.6), ("face", "b@1", 0.35)]
    await server.default.merge_lora(strength=1.0)
    assert server.job() == [("style", "a@1", 1.0), ("face", "b@1", 1.0)]
    await server.default.unmerge_lora()
    await server.default.merge_lora()
    assert server.job() == [("style", "a@1", 0.6), ("face", "b@1", 0.35)]


async def test_unmerging_nothing_and_merging_what_is_merged_change_nothing(server: Server) -> None:
    assert merged(await server.default.unmerge_lora()) == []
    await server.set("style", "a")
    await server.default.merge_lora()
    assert len(server.replicas[0].merges) == 2


async def test_one_expert_alone_can_be_unmerged(server: Server) -> None:
    await server.set("style", "a")
    await server.default.unmerge_lora(target=("critic",))
    assert server.replicas[0].weights[0].target == ("all",)
    status = await server.default.unmerge_lora(target=("transformer",))
    assert server.replicas[0].weights[0].target == ("transformer_2",)
    assert merged(status) == ["transformer_2"]
    assert merged(await server.default.unmerge_lora(target=("transformer_2",))) == []


async def test_what_is_active_is_told_by_transformer(server: Server) -> None:
    status = await server.default.set_lora(
        [LoRARequest("style", "a"), LoRARequest("face", "b", target=("transformer",))]
    )
    assert {transformer: nicknames(active.adapters) for transformer, active in status.active.items()} == {
        "transformer": ["style", "face"],
        "transformer_2": ["style"],
    }


async def test_an_adapter_for_one_expert_alone_is_active_there_alone(server: Server) -> None:
    server.files.transformers = ("transformer_2",)
    assert list((await server.set("low noise", "a")).active) == ["transformer_2"]


async def test_merging_before_anything_was_set_is_refused(server: Server) -> None:
    with pytest.raises(APIError, match="Call POST /v1/set_lora first"):
        await server.default.merge_lora()


async def test_targets_that_the_model_lacks_are_ignored_and_named(server: Server) -> None:
    status = await server.default.set_lora([LoRARequest("style", "a", target=("transformer", "critic"))])
    assert status.notes == ("target 'critic' is ignored: there is only transformer, transformer_2",)


# Names and files.


async def test_an_unknown_nickname_needs_a_path(server: Server) -> None:
    with pytest.raises(APIError, match="lora_path is needed") as refused:
        await server.set("style")
    assert refused.value.status == 404


async def test_a_nickname_moves_to_another_path_only_while_it_is_not_merged(server: Server) -> None:
    await server.set("style", "a")
    with pytest.raises(APIError, match="'style' stands for another lora_path") as refused:
        await server.set("style", "b")
    assert refused.value.status == 409
    await server.default.unmerge_lora()
    await server.set("style", "b")
    assert server.job() == [("style", "b@1", 1.0)]


async def test_one_nickname_given_twice_is_refused(server: Server) -> None:
    with pytest.raises(APIError, match="given twice"):
        await server.default.set_lora([LoRARequest("style", "a"), LoRARequest("style", "b")])


async def test_a_bad_adapter_leaves_what_was_active() -> None:
    server = Server(switch="auto")
    await server.start(1)
    await server.set("style", "a", 0.7)
    with pytest.raises(APIError, match="does not exist"):
        await server.default.set_lora([LoRARequest("face", "b"), LoRARequest("bad", "nowhere")])
    status = server.default.status()
    assert nicknames(status.set) == nicknames(server.replicas[0].weights) == ["style"]
    assert [loaded.nickname for loaded in status.loaded] == ["style"]
    assert server.job() == [("style", "a@1", 0.7)]
    await server.replicas[0].die()


async def test_a_changed_file_is_loaded_again_and_said_so(server: Server) -> None:
    await server.set("style", "a")
    server.files.versions["a"] = 2
    status = await server.set("style")
    assert status.notes == ("the file of 'style' has changed and was loaded again",)
    assert server.replicas[0].weights[0].identity == "a@2"
    assert (await server.set("style")).notes == ()


async def test_a_nickname_is_freed_unless_it_is_merged(server: Server) -> None:
    await server.set("style", "a")
    with pytest.raises(APIError, match="is merged"):
        await server.default.delete_lora("style")
    await server.default.unmerge_lora()
    status = await server.default.delete_lora("style")
    assert (status.loaded, status.set) == ((), ())
    with pytest.raises(APIError, match="not known"):
        await server.default.delete_lora("style")


async def test_what_is_merged_is_never_evicted() -> None:
    server = Server(cache_bytes=0)
    await server.set("a", "a")
    await server.registry.for_job([LoRARequest("b", "b")])
    await server.registry.factors("a@1")
    assert server.files.loads == ["a", "b"]


async def test_a_composition_larger_than_the_cache_is_loaded_once() -> None:
    server = Server(cache_bytes=0)
    await server.start(1)
    await server.default.set_lora([LoRARequest(name, name) for name in "abc"])
    assert server.files.loads == ["a", "b", "c"]
    await server.replicas[0].die()


# Replicas.


async def test_without_replicas_set_lora_returns_at_once_and_a_late_one_catches_up() -> None:
    server = Server()
    await server.set("style", "a")
    await server.start(1)
    await until(lambda: nicknames(server.replicas[0].weights) == ["style"])
    await server.replicas[0].die()


async def test_a_failing_replica_fails_the_call_and_the_previous_default_comes_back() -> None:
    server = Server(switch="auto")
    await server.start(2)
    await server.set("style", "a")
    server.replicas[1].fails_on = {"face"}
    with pytest.raises(APIError, match="'face' could not be merged: replica-1: no memory for face") as failed:
        await server.set("face", "b")
    assert (failed.value.status, failed.value.code) == (500, "lora_merge_failed")
    assert [nicknames(replica.weights) for replica in server.replicas] == [["style"], ["style"]]
    assert server.job() == [("style", "a@1", 1.0)]
    assert [loaded.nickname for loaded in server.default.status().loaded] == ["style"]
    for replica in server.replicas:
        await replica.die()


async def test_a_busy_replica_is_waited_for_as_long_as_it_polls(server: Server) -> None:
    server.replicas[0].busy.clear()
    setting = asyncio.create_task(server.set("style", "a"))
    await asyncio.sleep(0.3)  # three times as long as it takes to be forgotten
    assert not setting.done()
    assert server.job() == []
    server.replicas[0].busy.set()
    await setting
    assert nicknames(server.replicas[0].weights) == ["style"]


async def test_a_replica_that_died_is_forgotten(server: Server) -> None:
    await server.replicas[0].die()
    async with asyncio.timeout(2):
        status = await server.set("style", "a")
    assert list(status.replicas) == ["replica-1"]


async def test_a_cancelled_call_leaves_the_previous_default(server: Server) -> None:
    server.replicas[0].busy.clear()
    setting = asyncio.create_task(server.set("style", "a"))
    await asyncio.sleep(0.05)
    setting.cancel()
    with suppress(asyncio.CancelledError):
        await setting
    server.replicas[0].busy.set()
    await server.set("face", "b")
    assert [nicknames(replica.weights) for replica in server.replicas] == [["face"], ["face"]]


async def test_changes_that_come_at_once_are_made_one_after_the_other(server: Server) -> None:
    outcomes = await asyncio.gather(*[server.set(name, name) for name in "abcd"], return_exceptions=True)
    assert [type(outcome) for outcome in outcomes].count(APIError) == 3
    assert server.replicas[0].weights == server.replicas[1].weights


# Restarts.


async def test_after_a_restart_the_default_is_what_it_was_and_reaches_every_replica(server: Server) -> None:
    await server.set("style", "a", 0.7)
    later = await server.restarted()
    assert later.job() == [("style", "a@1", 0.7)]
    assert later.files.loads == []
    await later.start(1)
    await until(lambda: nicknames(later.replicas[0].weights) == ["style"])
    assert later.files.loads == ["a"]
    await later.replicas[0].die()


async def test_after_a_restart_what_was_unmerged_can_be_merged_again(server: Server) -> None:
    await server.set("style", "a", 0.7)
    await server.default.unmerge_lora()
    later = await server.restarted()
    assert later.job() == []
    await later.default.merge_lora()
    assert later.job() == [("style", "a@1", 0.7)]
