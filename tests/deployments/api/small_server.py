"""A server without Ray: the application over a real state, real files and an engine that computes nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
from fastapi import FastAPI

from configs.server_args import ServerArgs
from deployments.ingress import create_app
from deployments.keys import Keyring
from deployments.state import State
from pipelines.job import Task
from tests.deployments.api.stand_in import StandInEngine
from tests.deployments.step_engine import StepEngine


class AbleEngine(StandInEngine, StepEngine):
    """Takes every job, from pictures too, and gives what `StepEngine` gives."""

    def __init__(self, folder: Path):
        StandInEngine.__init__(self, *Task)
        StepEngine.__init__(self, folder)

    async def ready(self) -> None:
        """At once."""


@asynccontextmanager
async def running_app(folder: Path, **args: object) -> AsyncIterator[tuple[FastAPI, State]]:
    """The application with these arguments, its state in `folder`."""
    server_args = ServerArgs(output_path=str(folder / "outputs"), state_path=str(folder / "jobs.sqlite3"), **args)
    engine = AbleEngine(folder)
    state = State(server_args, lambda: engine)
    yield create_app(server_args, engine, state, Keyring.read(server_args)), state
    await state.close()


def client(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test")
