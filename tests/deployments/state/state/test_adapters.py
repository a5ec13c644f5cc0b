"""`State` and adapters: those of accepted jobs stay known while they are needed, through restarts and deletes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.server_args import ServerArgs
from deployments.errors import APIError
from deployments.interfaces import LoRARequest
from deployments.state.state import State
from pipelines.job import Job, LoRASpec, Task
from tests.deployments.state.adapter_files import AdapterFiles
from tests.deployments.step_engine import StepEngine


class LoadingEngine(StepEngine, AdapterFiles):
    """Computes videos and reads adapters."""

    def __init__(self, folder: Path):
        StepEngine.__init__(self, folder)
        AdapterFiles.__init__(self)


@pytest.fixture
def args(tmp_path: Path) -> ServerArgs:
    return ServerArgs(output_path=str(tmp_path / "outputs"), state_path=str(tmp_path / "jobs.sqlite3"))


@pytest.fixture
def engine(tmp_path: Path) -> LoadingEngine:
    return LoadingEngine(tmp_path)


def clip(video_id: str, lora: tuple[LoRASpec, ...]) -> Job:
    size = {"width": 64, "height": 64, "num_inference_steps": 4, "seeds": (7,), "output_format": "mp4"}
    return Job(id=video_id, task=Task.TEXT_TO_VIDEO, prompt="waves", lora=lora, **size)


def noted(state: State) -> list[str]:
    """Identities of the adapters that would be known after a restart."""
    return [adapter["identity"] for adapter in state._records.notes.read("adapters")["adapters"]]


async def test_the_adapter_of_an_accepted_video_is_known_after_a_delete_and_a_restart(
    state: State, args: ServerArgs, engine: LoadingEngine
) -> None:
    engine.allow("video_1", 0)
    lora = await state.lora_for_job([LoRARequest("style", "a")])
    await state.delete_lora("style")
    await state.create_video(clip("video_1", lora), {}, "wan")
    await state.close()

    later = State(args, lambda: engine)
    assert (await later.list_loras()).loaded == ()
    assert await later.lora_factors("a@1") == "factors of a@1"
    await later.delete_video("video_1")
    await later.close()


async def test_what_nothing_names_any_more_is_forgotten(state: State) -> None:
    for nickname, path in [("style", "a"), ("face", "b")]:
        await state.set_lora([LoRARequest(nickname, path)])
        await state.unmerge_lora()
    assert noted(state) == ["a@1", "b@1"]
    await state.delete_lora("style")
    assert noted(state) == ["b@1"]


async def test_a_merged_adapter_and_its_strength_outlive_the_state(
    state: State, args: ServerArgs, engine: LoadingEngine
) -> None:
    await state.set_lora([LoRARequest("style", "a", 0.7)])
    await state.close()
    later = State(args, lambda: engine)
    (spec,) = await later.lora_for_job(None)
    assert (spec.nickname, spec.identity, spec.strength) == ("style", "a@1", 0.7)
    with pytest.raises(APIError, match="'style' is merged"):
        await later.delete_lora("style")
    await later.close()


@pytest.fixture
def started_with(args: ServerArgs, engine: LoadingEngine) -> Callable[[str], State]:
    """The state of a server started with the adapter at this path."""
    return lambda path: State(args.model_copy(update={"lora_path": path, "lora_nickname": "start"}), lambda: engine)


async def test_jobs_wait_for_the_adapter_of_the_start(started_with: Callable[[str], State]) -> None:
    state = started_with("a")
    assert [spec.identity for spec in await state.lora_for_job(None)] == ["a@1"]
    await state.close()


async def test_an_adapter_of_the_start_that_failed_is_tried_again(
    started_with: Callable[[str], State], engine: LoadingEngine
) -> None:
    state = started_with("late")
    for _ in range(2):
        with pytest.raises(APIError, match="'late' does not exist"):
            await state.lora_for_job(None)
    engine.versions["late"] = 1
    assert [spec.identity for spec in await state.lora_for_job(None)] == ["late@1"]
    await state.close()


async def test_whoever_sets_another_adapter_does_without_that_of_the_start(
    started_with: Callable[[str], State], engine: LoadingEngine
) -> None:
    state = started_with("late")
    with pytest.raises(APIError):
        await state.adapters_open()
    await state.set_lora([LoRARequest("style", "a")])
    engine.versions["late"] = 1
    assert [spec.identity for spec in await state.lora_for_job(None)] == ["a@1"]
    await state.close()


async def test_a_file_that_changed_before_a_restart_is_read_anew(
    args: ServerArgs, engine: LoadingEngine, started_with: Callable[[str], State]
) -> None:
    begin: list[Callable[[], State]] = [lambda: State(args, lambda: engine), lambda: started_with("a")]
    for start in begin:
        engine.versions["a"] = 1
        state = start()
        await state.lora_for_job(None)
        await state.set_lora([LoRARequest("start", "a", 0.7)])
        await state.close()
        engine.versions["a"] = 2
        later = start()
        (spec,) = await later.lora_for_job(None)
        assert (spec.identity, spec.strength) == ("a@2", 0.7)
        await later.unmerge_lora()
        await later.close()


async def test_a_default_that_is_gone_hinders_only_the_jobs_that_get_it(
    state: State, args: ServerArgs, engine: LoadingEngine
) -> None:
    await state.set_lora([LoRARequest("style", "a")])
    await state.close()
    del engine.versions["a"]
    later = State(args, lambda: engine)
    await later.adapters_open()
    assert await later.lora_for_job([]) == ()
    (spec,) = await later.lora_for_job(None)
    with pytest.raises(APIError, match="does not exist"):
        await later.lora_factors(spec.identity)
    await later.close()


async def test_without_an_engine_jobs_get_the_default_as_it_was_and_clients_can_change_it(
    state: State, args: ServerArgs, engine: LoadingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await state.set_lora([LoRARequest("style", "a")])
    await state.close()
    monkeypatch.setattr("deployments.state.state.RELOAD_PATIENCE_S", 0.05)
    starting = asyncio.Event()

    async def identify_once_there_is_an_engine(path: str) -> str:
        await starting.wait()
        return f"{path}@{engine.versions[path]}"

    monkeypatch.setattr(engine, "identify_lora", identify_once_there_is_an_engine)
    later = State(args, lambda: engine)
    async with asyncio.timeout(2):
        assert await later.lora_for_job([]) == ()
        assert [spec.identity for spec in await later.lora_for_job(None)] == ["a@1"]
        await later.unmerge_lora()
    starting.set()
    assert await later.lora_for_job(None) == ()
    await later.close()


async def test_an_engine_that_is_not_there_yet_is_asked_again(
    state: State, args: ServerArgs, engine: LoadingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await state.set_lora([LoRARequest("style", "a")])
    await state.close()
    monkeypatch.setattr("deployments.state.state.RELOAD_DELAY_S", 0.01)
    engine.versions["a"] = 2
    makers = iter([APIError(503, "The engine is not deployed"), APIError(503, "It loads"), engine, engine, engine])

    def make() -> LoadingEngine:
        if isinstance(made := next(makers), APIError):
            raise made
        return made

    later = State(args, make)
    assert [spec.identity for spec in await later.lora_for_job(None)] == ["a@2"]
    await later.close()


async def test_what_was_merged_into_another_model_is_not_merged_into_this_one(
    state: State, args: ServerArgs, engine: LoadingEngine
) -> None:
    await state.set_lora([LoRARequest("style", "a")])
    await state.close()
    later = State(args.model_copy(update={"model_path": "/models/another"}), lambda: engine)
    assert await later.lora_for_job(None) == ()
    assert [spec.identity for spec in await later.lora_for_job([LoRARequest("style")])] == ["a@1"]
    await later.close()


async def test_a_request_with_a_known_nickname_writes_nothing(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    await state.lora_for_job([LoRARequest("style", "a")])
    monkeypatch.setattr(state._records.notes, "write", lambda *args: pytest.fail("written"))
    await state.lora_for_job([LoRARequest("style")])
    await state.lora_for_job([LoRARequest("style", "a")])
