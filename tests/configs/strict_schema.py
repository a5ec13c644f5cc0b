"""Serve's own schema, made strict: pydantic ignores unknown keys, and so would miss typos."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema


def validate(config: dict[str, Any]) -> ServeDeploySchema:
    """Raise a `ValueError` that names every key that Serve would ignore, or pydantic's error for wrong values."""
    unknown = list(unknown_keys(config, ServeDeploySchema))
    if unknown:
        raise ValueError(f"Serve does not know {', '.join(unknown)}")
    return ServeDeploySchema.model_validate(config)


def unknown_keys(value: Any, annotation: Any, place: str = "") -> Iterator[str]:
    """The paths of all keys in `value` that are not a field of any model in `annotation`."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from unknown_keys(item, annotation, f"{place}[{index}]")
    elif isinstance(value, dict) and (models := list(_models(annotation))):
        fields = {name: info for model in models for name, info in model.model_fields.items()}
        for key, item in value.items():
            here = f"{place}.{key}".lstrip(".")
            if key in fields:
                yield from unknown_keys(item, fields[key].annotation, here)
            else:
                yield here


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models that a type mentions: in `Optional`, `Union`, `List`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
