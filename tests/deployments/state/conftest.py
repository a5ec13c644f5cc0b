from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from configs.server_args import ServerArgs
from deployments.state import video_runner
from deployments.state.state import State
from tests.deployments.state.videos import MAX_ATTEMPTS
from tests.deployments.step_engine import StepEngine


@pytest.fixture
def args(tmp_path: Path) -> ServerArgs:
    return ServerArgs(
        output_path=str(tmp_path / "outputs"),
        state_path=str(tmp_path / "jobs.sqlite3"),
        max_retries=MAX_ATTEMPTS - 1,
    )


@pytest.fixture
def engine(tmp_path: Path) -> StepEngine:
    return StepEngine(tmp_path)


@pytest.fixture
async def state(args: ServerArgs, engine: StepEngine) -> AsyncIterator[State]:
    state = State(args, lambda: engine)
    yield state
    await state.close()


@pytest.fixture(autouse=True)
def retry_soon(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(video_runner, "_RETRY_DELAY_S", 0.02)
