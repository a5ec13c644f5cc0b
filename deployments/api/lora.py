"""`/v1/set_lora` and related routes: the adapters that jobs get by default.

The routes and the shapes of their responses are SGLang's. A JSON body is read as JSON even where its Content-Type says
urlencoded, as curl's does by default.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request

from deployments.api.body import read_fields
from deployments.api.openapi import JSON, errors, request_body
from deployments.api.protocol.lora import LoRATargets, MergeLoRA, SetLoRA
from deployments.api.protocol.responses import ActiveAdapters, AppliedLoRA, LoadedAdapter, LoRAList, LoRAResponse
from deployments.api.services import Served
from deployments.interfaces import LoRAStatus
from pipelines.job import LoRASpec

router = APIRouter(prefix="/v1", tags=["LoRA"])


@router.post("/set_lora", responses=errors(400, 404, 409, 503), openapi_extra=request_body(SetLoRA, JSON))
async def set_lora(request: Request, services: Served) -> LoRAResponse:
    """Load adapters, merge them, and give them to new jobs."""
    wanted = SetLoRA.parse(await read_fields(request))
    status = await services.state.set_lora(wanted.adapters())
    return _responded(f"Successfully set LoRA adapter(s): {_composition(status.default)}", status)


@router.post(
    "/merge_lora_weights",
    responses=errors(400, 404, 409, 503),
    openapi_extra=request_body(MergeLoRA, JSON, required=False),
)
async def merge_lora_weights(request: Request, services: Served) -> LoRAResponse:
    """Merge again the adapters that were set and then unmerged."""
    wanted = MergeLoRA.parse(await read_fields(request))
    status = await services.state.merge_lora(wanted.strength, tuple(wanted.target) if wanted.target else None)
    return _responded(f"Successfully merged LoRA weights: {_composition(status.default)}", status)


@router.post(
    "/unmerge_lora_weights",
    responses=errors(400, 503),
    openapi_extra=request_body(LoRATargets, JSON, required=False),
)
async def unmerge_lora_weights(request: Request, services: Served) -> LoRAResponse:
    """Restore the base weights, bit for bit. New jobs get no adapter unless they ask for one."""
    wanted = LoRATargets.parse(await read_fields(request))
    status = await services.state.unmerge_lora(tuple(wanted.target) if wanted.target else None)
    return _responded(f"Successfully unmerged LoRA weights (target: {', '.join(wanted.target or ['all'])})", status)


@router.delete("/loras/{nickname:path}", responses=errors(404, 409, 503))
async def delete_lora(nickname: str, services: Served) -> LoRAResponse:
    """Forget a nickname, and free the memory of its factors."""
    return _responded(f"Successfully deleted LoRA adapter: {nickname}", await services.state.delete_lora(nickname))


@router.get("/list_loras", responses=errors(503))
async def list_loras(services: Served) -> LoRAList:
    """List the adapters that are loaded, those that were set, and those that each engine replica has merged."""
    return _listing(await services.state.list_loras())


def _composition(adapters: Sequence[LoRASpec]) -> str:
    return ", ".join(f"{a.nickname} (target: {', '.join(a.target)}, strength: {a.strength:.2f})" for a in adapters)


def _listing(status: LoRAStatus) -> LoRAList:
    return LoRAList(
        loaded_adapters=[
            LoadedAdapter(nickname=a.nickname, path=a.path, rank=a.rank, num_bytes=a.num_bytes) for a in status.loaded
        ],
        active=_active(status),
        replicas={
            replica: [AppliedLoRA(nickname=a.nickname, strength=a.strength, target=list(a.target)) for a in adapters]
            for replica, adapters in status.replicas.items()
        },
        num_bytes_held=dict(status.num_bytes_held),
    )


def _responded(message: str, status: LoRAStatus) -> LoRAResponse:
    return LoRAResponse(message="; ".join((message, *status.notes)), **dict(_listing(status)))


def _active(status: LoRAStatus) -> dict[str, list[ActiveAdapters]]:
    paths = {adapter.nickname: adapter.path for adapter in status.loaded}
    return {
        transformer: [
            ActiveAdapters(
                nickname=",".join(a.nickname for a in active.adapters),
                nicknames=[a.nickname for a in active.adapters],
                path=",".join(paths[a.nickname] for a in active.adapters),
                merged=active.merged,
                mode="merged" if active.merged else "unmerged",
                strength=active.adapters[0].strength,
                strengths=[a.strength for a in active.adapters],
            )
        ]
        for transformer, active in status.active.items()
    }
