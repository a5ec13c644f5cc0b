"""Replicas that join, fail, are busy or die, and restarts of the state."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from deployments.errors import APIError
from tests.deployments.state.default_lora.replicas import Server, nicknames, until


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
    await asyncio.sleep(0.3)  # three times the delay after which a replica is forgotten
    assert not setting.done()
    assert server.job() == []
    server.replicas[0].busy.set()
    await setting
    assert nicknames(server.replicas[0].weights) == ["style"]


async def test_a_busy_replica_is_known_to_a_state_actor_that_restarts_too(server: Server) -> None:
    server.replicas[0].busy.clear()
    setting = asyncio.create_task(server.set("style", "a"))
    await asyncio.sleep(0.05)
    server.propagation.version = 2 * server.propagation.version  # another version, as after a restart
    await asyncio.sleep(0.3)  # three times the delay after which a replica is forgotten
    assert "replica-0" in server.propagation.replicas
    setting.cancel()
    server.replicas[0].busy.set()


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
