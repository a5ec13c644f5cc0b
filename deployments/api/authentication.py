"""FastAPI dependencies that give a route its caller, and restrict some routes to admins."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from deployments.api.keys import Caller
from deployments.api.services import Served

_BEARER = HTTPBearer(scheme_name="API key", auto_error=False)


async def _caller(
    services: Served, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
) -> Caller:
    return services.keyring.caller(credentials.credentials if credentials else None)


Known = Annotated[Caller, Depends(_caller)]
"""Annotation of the route parameter that receives the caller."""


async def known(caller: Known) -> None:
    """Dependency of every route under /v1."""


async def admin_only(caller: Known) -> None:
    """Dependency of routes whose changes affect all requests."""
    caller.require_admin("This route")
