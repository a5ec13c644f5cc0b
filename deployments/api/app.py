"""The HTTP application: every route over the engine and the state actor, with request ids and errors in one form."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline

from configs.server_args import ServerArgs
from deployments.api import error_responses, health, images, lora, models, openapi, videos
from deployments.api.authentication import admin_only, known
from deployments.api.keys import OPEN, Keyring
from deployments.api.middleware import RequestMiddleware
from deployments.api.services import Services
from deployments.errors import APIError
from deployments.interfaces import Engine, State

NOT_OFFERED = (
    "/v1/images/variations",
    "/v1/videos/edits",
    "/v1/videos/extensions",
    "/v1/videos/characters",
    "/v1/videos/{video_id}/remix",
)
"""OpenAI's routes that this server lacks. OpenAI's clients retry a 501, so they get a 404."""


def create_app(
    args: ServerArgs, engine: Engine, state: State, keyring: Keyring = OPEN, *, sends_request_id: bool = True
) -> FastAPI:
    """The application as an ASGI callable. It keeps no state between requests.

    Args:
        sends_request_id: whether the application puts `x-request-id` on its responses. Ray Serve gives every request an
            id before it arrives here and adds it to the response itself; a second header would be joined to the first.
    """
    app = FastAPIOffline(
        title="ditserve",
        version=version("ditserve"),
        description="OpenAI's Images and Videos API and SGLang's LoRA management for diffusion transformers.",
    )
    app.state.services = Services(args, engine, state, keyring)
    app.add_middleware(RequestMiddleware, sends_id=sends_request_id)
    if args.allowed_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=args.allowed_origin,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    error_responses.install(app)
    openapi.install(app, needs_key=keyring != OPEN)
    guarded = APIRouter(dependencies=[Depends(known)], responses=openapi.errors(401))
    for router in (_not_offered(), images.router, videos.router, models.router):
        guarded.include_router(router)
    guarded.include_router(lora.router, dependencies=[Depends(admin_only)], responses=openapi.errors(403))
    app.include_router(guarded)
    app.include_router(health.router)
    return app


def _not_offered() -> APIRouter:
    router = APIRouter()

    async def refuse(request: Request) -> None:
        raise APIError(404, f"This server does not offer POST {request.url.path}", code="not_offered")

    for path in NOT_OFFERED:
        router.add_api_route(path, refuse, methods=["POST"], include_in_schema=False)
    return router
