"""`/v1/models`: the one model that is served."""

from __future__ import annotations

from fastapi import APIRouter

from configs.model_family import ModelCard
from deployments.api.openapi import errors
from deployments.api.protocol.responses import ModelList, ModelObject
from deployments.api.services import Served
from deployments.errors import APIError
from pipelines.job import Task

router = APIRouter(prefix="/v1/models", tags=["Models"])


@router.get("", responses=errors(503))
async def list_models(services: Served) -> ModelList:
    """List the served model."""
    return ModelList(data=[_object(await services.engine.card())])


@router.get("/{model:path}", responses=errors(404, 503))
async def get_model(model: str, services: Served) -> ModelObject:
    """Describe the served model. Its id may contain slashes."""
    card = await services.engine.card()
    if model != card.id:
        raise APIError(404, f"The model '{model}' does not exist", param="model", code="model_not_found")
    return _object(card)


def _object(card: ModelCard) -> ModelObject:
    types = task_types({Task(name) for name in card.family.tasks})
    return ModelObject(
        id=card.id,
        created=card.created,
        root=card.id,
        num_gpus=card.num_gpus,
        task_type=types[0],
        supported_task_types=types,
        dit_precision=card.dtype,
        vae_precision=card.vae_dtype,
        pipeline_class=card.pipeline_class,
        family=card.family.name,
        device=card.device,
    )


def task_types(tasks: set[Task]) -> list[str]:
    """SGLang's names for what a model does, the main one first: videos before images."""
    types = []
    for text, image, target in (
        (Task.TEXT_TO_VIDEO, Task.IMAGE_TO_VIDEO, "V"),
        (Task.TEXT_TO_IMAGE, Task.IMAGE_EDIT, "I"),
    ):
        sources = ("T" if text in tasks else "") + ("I" if image in tasks else "")
        if sources:
            types.append(f"{sources}2{target}")
    return types
