"""What every route works with, as a FastAPI dependency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from configs.server_args import ServerArgs
from deployments.api.keys import OPEN, Keyring
from deployments.interfaces import Engine, State


@dataclass(frozen=True)
class Services:
    args: ServerArgs
    engine: Engine
    state: State
    keyring: Keyring = OPEN


async def _services(request: Request) -> Services:
    """A coroutine, like every dependency here: FastAPI runs plain functions in a thread, which took 0.7 of the 7 ms of
    CPU that a `GET /v1/videos` costs its ingress."""
    services: Services = request.app.state.services
    return services


Served = Annotated[Services, Depends(_services)]
"""Annotation of the route parameter that receives the `Services` of its app."""
