"""Serve's own schema, made strict: pydantic ignores what it does not know, and so would a typo be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema


def validate(config: dict[str, Any]) -> ServeDeploySchema:
    """Raises `ValueError` that names every key that Serve would ignore, and pydantic's for every wrong value."""
    unknown = list(unknown_keys(config, ServeDeploySchema))
    if unknown:
        raise ValueError(f"Serve does not know {', '.join(unknown)}")
    return ServeDeploySchema.model_validate(config)


def unknown_keys(value: Any, annotation: Any, place: str = "") -> Iterator[str]:
    """The places of all keys in `value` that no model in `annotation` has as a field."""
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
