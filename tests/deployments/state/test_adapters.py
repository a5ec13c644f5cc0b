"""Nicknames, the files they stand for, and the cache of factors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from deployments.errors import APIError
from deployments.interfaces import LoRARequest
from deployments.state.adapters import AdapterRegistry
from pipelines.job import LoRASpec
from tests.deployments.state.adapter_files import SIZE, AdapterFiles


@pytest.fixture
def files() -> AdapterFiles:
    return AdapterFiles()


@pytest.fixture
def registry(files: AdapterFiles) -> AdapterRegistry:
    return AdapterRegistry(lambda: files, cache_bytes=10 * SIZE)


async def specs(registry: AdapterRegistry, *requests: LoRARequest) -> list[tuple[str, str, float]]:
    return [(spec.nickname, spec.identity, spec.strength) for spec in await registry.for_job(requests)]


def nicknames(registry: AdapterRegistry) -> list[str]:
    return [loaded.nickname for loaded in registry.loaded]


# Names and files.


async def test_a_nickname_stands_for_the_file_it_was_first_used_with(registry: AdapterRegistry) -> None:
    assert await specs(registry, LoRARequest("face", "b", 0.5)) == [("face", "b@1", 0.5)]
    assert await specs(registry, LoRARequest("face")) == [("face", "b@1", 1.0)]
    assert await registry.for_job([]) == ()


async def test_an_unknown_nickname_needs_a_path(registry: AdapterRegistry) -> None:
    with pytest.raises(APIError, match="its path is needed") as refused:
        await registry.for_job([LoRARequest("face")])
    assert refused.value.status == 404


async def test_a_job_cannot_move_a_nickname(registry: AdapterRegistry) -> None:
    await registry.for_job([LoRARequest("face", "b")])
    with pytest.raises(APIError, match="stands for another lora_path") as refused:
        await registry.for_job([LoRARequest("face", "c")])
    assert refused.value.status == 409


async def test_one_nickname_given_twice_is_refused(registry: AdapterRegistry) -> None:
    with pytest.raises(APIError, match="given twice"):
        await registry.for_job([LoRARequest("face", "a"), LoRARequest("face", "b")])


async def test_a_bad_adapter_takes_no_nickname(registry: AdapterRegistry) -> None:
    with pytest.raises(APIError, match="does not exist"):
        await registry.for_job([LoRARequest("bad", "nowhere")])
    assert nicknames(registry) == []


async def test_a_free_nickname_may_stand_for_another_file(registry: AdapterRegistry) -> None:
    await registry.for_job([LoRARequest("face", "b")])
    registry.forget("face")
    assert await specs(registry, LoRARequest("face", "c")) == [("face", "c@1", 1.0)]
    with pytest.raises(APIError, match="not known") as refused:
        registry.forget("hand")
    assert refused.value.status == 404


@pytest.mark.parametrize(
    ("target", "changed", "ignored"),
    [
        (("all",), ("transformer", "transformer_2"), []),
        (("transformer_2",), ("transformer_2",), []),
        (("transformer", "critic"), ("transformer",), ["critic"]),
        (("critic",), (), ["critic"]),
    ],
)
async def test_a_target_is_one_of_the_transformers_that_the_adapter_has_factors_for(
    registry: AdapterRegistry, target: tuple[str, ...], changed: tuple[str, ...], ignored: list[str]
) -> None:
    (spec,) = await registry.for_job([LoRARequest("style", "a", target=target)])
    assert registry.transformers_of(spec) == changed
    assert registry.ignored_targets(spec) == [
        f"target '{name}' is ignored: there is only transformer, transformer_2" for name in ignored
    ]


# Memory.


async def test_jobs_that_need_the_same_adapter_load_it_once(registry: AdapterRegistry, files: AdapterFiles) -> None:
    await asyncio.gather(*[registry.for_job([LoRARequest("face", "b")]) for _ in range(5)])
    assert files.loads == ["b"]


async def test_an_evicted_adapter_is_loaded_again_from_its_path_once(files: AdapterFiles) -> None:
    registry = AdapterRegistry(lambda: files, cache_bytes=2 * SIZE)
    for name in "abc":
        await registry.for_job([LoRARequest(name, name)])
    assert await registry.factors("c@1") == "factors of c@1"
    assert files.loads == ["a", "b", "c"]
    assert await asyncio.gather(*[registry.factors("a@1") for _ in range(3)]) == ["factors of a@1"] * 3
    assert files.loads == ["a", "b", "c", "a"]


async def test_what_is_pinned_is_never_evicted(files: AdapterFiles) -> None:
    registry = AdapterRegistry(lambda: files, cache_bytes=0)
    registry.pin(await registry.for_job([LoRARequest("a", "a")]))
    await registry.for_job([LoRARequest("b", "b")])
    await registry.factors("a@1")
    assert files.loads == ["a", "b"]


async def test_a_freed_nickname_frees_the_factors_unless_another_stands_for_them(
    registry: AdapterRegistry, files: AdapterFiles
) -> None:
    await registry.for_job([LoRARequest("one", "a"), LoRARequest("other", "a")])
    registry.forget("one")
    await registry.factors("a@1")
    assert files.loads == ["a"]
    registry.forget("other")
    await registry.factors("a@1")  # for a job that was accepted earlier
    assert files.loads == ["a", "a"]


async def test_weights_that_are_gone_for_good_are_not_replaced_by_others(files: AdapterFiles) -> None:
    registry = AdapterRegistry(lambda: files, cache_bytes=0)
    (spec,) = await registry.for_job([LoRARequest("a", "a")])
    await registry.for_job([LoRARequest("b", "b")])
    files.versions["a"] = 2
    with pytest.raises(APIError, match="has changed since it was loaded") as refused:
        await registry.factors(spec.identity)
    assert refused.value.status == 409


async def test_factors_of_what_was_never_loaded_are_not_found(registry: AdapterRegistry) -> None:
    with pytest.raises(APIError, match="never been loaded") as refused:
        await registry.factors("a@1")
    assert refused.value.status == 404


# Restarts.


async def restarted(registry: AdapterRegistry, files: AdapterFiles, *in_use: LoRASpec) -> AdapterRegistry:
    later = AdapterRegistry(lambda: files, cache_bytes=10 * SIZE)
    later.restore(json.loads(json.dumps(registry.snapshot({spec.identity for spec in in_use}))))
    return later


async def test_a_snapshot_brings_everything_back_but_the_factors(
    registry: AdapterRegistry, files: AdapterFiles
) -> None:
    before = await registry.for_job([LoRARequest("style", "a", 0.7), LoRARequest("face", "b")])
    later = await restarted(registry, files)
    assert later.loaded == registry.loaded
    assert await later.for_job([LoRARequest("style", strength=0.7), LoRARequest("face")]) == before
    assert files.loads == ["a", "b"]
    assert await later.factors("a@1") == "factors of a@1"
    assert files.loads == ["a", "b", "a"]


async def test_a_snapshot_forgets_what_nothing_names_any_more(registry: AdapterRegistry, files: AdapterFiles) -> None:
    (of_a_job,) = await registry.for_job([LoRARequest("style", "a")])
    await registry.for_job([LoRARequest("face", "b")])
    for nickname in ("style", "face"):
        registry.forget(nickname)
    later = await restarted(registry, files, of_a_job)
    assert await later.factors(of_a_job.identity) == "factors of a@1"
    with pytest.raises(APIError, match="never been loaded"):
        await later.factors("b@1")


@pytest.mark.parametrize(
    ("requests", "changed"),
    [([LoRARequest("style")], False), ([LoRARequest("style", "a")], False), ([LoRARequest("face", "b")], True)],
    ids=["a known nickname", "a known nickname with its path", "a new one"],
)
async def test_only_what_a_snapshot_holds_counts_as_a_change(
    registry: AdapterRegistry, requests: list[Any], changed: bool
) -> None:
    await registry.for_job([LoRARequest("style", "a")])
    before = registry.changes
    await registry.for_job(requests)
    assert (registry.changes != before) is changed
