"""Probes: `/health` succeeds while the process lives, `/ready` when every rank responds."""

from __future__ import annotations

from fastapi import APIRouter

from deployments.api.openapi import errors
from deployments.api.protocol.responses import Health
from deployments.api.services import Served

router = APIRouter(tags=["Health"])


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> Health:
    """Alive, whether or not a model is loaded."""
    return Health(status="ok")


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses=errors(503))
async def ready(services: Served) -> Health:
    """Every rank of the engine has just responded."""
    await services.engine.ready()
    return Health(status="ready")
