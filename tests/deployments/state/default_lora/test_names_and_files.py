"""What a nickname stands for, and what is kept of the files behind it."""

from __future__ import annotations

import pytest

from deployments.errors import APIError
from deployments.interfaces import LoRARequest
from tests.deployments.state.default_lora.replicas import Server, nicknames, until


async def test_an_unknown_nickname_needs_a_path(server: Server) -> None:
    with pytest.raises(APIError, match="its path is needed") as refused:
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
    assert nicknames(status.default) == nicknames(server.replicas[0].weights) == ["style"]
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


async def test_a_file_that_changed_while_nobody_looked_is_found_by_a_reload(server: Server) -> None:
    await server.set("style", "a", 0.7)
    later = await server.restarted()
    later.files.versions["a"] = 2
    await later.default.reload()
    await later.start(1)
    await until(lambda: later.replicas[0].weights != ())
    assert later.job() == [("style", "a@2", 0.7)]
    assert later.replicas[0].weights[0].identity == "a@2"
    await later.default.unmerge_lora()
    await later.default.merge_lora()
    assert later.job() == [("style", "a@2", 0.7)]
    await later.replicas[0].die()


async def test_a_reload_leaves_what_cannot_be_read_to_fail_the_jobs_that_get_it(server: Server) -> None:
    await server.set("style", "a")
    later = await server.restarted()
    del later.files.versions["a"]
    await later.default.reload()
    assert later.job() == [("style", "a@1", 1.0)]
    with pytest.raises(APIError, match="does not exist"):
        await later.registry.factors("a@1")


async def test_a_nickname_is_freed_unless_it_is_merged(server: Server) -> None:
    await server.set("style", "a")
    with pytest.raises(APIError, match="is merged"):
        await server.default.delete_lora("style")
    await server.default.unmerge_lora()
    status = await server.default.delete_lora("style")
    assert (status.loaded, status.active) == ((), {})
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
