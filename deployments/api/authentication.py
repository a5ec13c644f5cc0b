"""Who calls a route, told to it by FastAPI, and the routes that not everybody may call."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from deployments.api.services import Served
from deployments.keys import Caller

_BEARER = HTTPBearer(
    scheme_name="API key", auto_error=False, description="Where the server was started with `--api-key`."
)


async def _caller(
    services: Served, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
) -> Caller:
    return services.keyring.caller(credentials.credentials if credentials else None)


Known = Annotated[Caller, Depends(_caller)]
"""The type of a route's parameter that receives its caller."""


async def known(caller: Known) -> None:
    """A dependency of every route below /v1."""


async def admin_only(caller: Known) -> None:
    """A dependency of routes that change what all requests get."""
    caller.require_admin("This route")
