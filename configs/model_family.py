"""What each model family can do and how it is sampled by default, read from `configs/models/*.yaml`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field


class Match(BaseModel):
    """Which models belong to the family, judged by their configuration files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pipelines: tuple[str, ...]
    """Names of diffusers pipeline classes (`_class_name`)."""
    config: Mapping[str, Any] = Field(default_factory=dict)
    """Further entries that `model_index.json` must have, with their values."""
    components: tuple[str, ...] = ()
    """Components the model must really have (an absent one is listed as `[null, null]`)."""
    component_config: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    """Entries that a component's own configuration file must have, with their values, by component. They distinguish a
    distilled model from its original where `model_index.json` is the same."""

    def __call__(self, model_index: Mapping[str, Any], component_configs: Mapping[str, Mapping[str, Any]]) -> bool:
        return (
            model_index["_class_name"] in self.pipelines
            and all(model_index.get(key) == value for key, value in self.config.items())
            and all(model_index.get(name, [None])[0] is not None for name in self.components)
            and all(
                component_configs.get(name, {}).get(key) == value
                for name, entries in self.component_config.items()
                for key, value in entries.items()
            )
        )

    @property
    def specificity(self) -> int:
        """Number of conditions beyond the pipeline class."""
        return len(self.config) + len(self.components) + sum(map(len, self.component_config.values()))


class SamplingDefaults(BaseModel):
    """What a request with nothing but a prompt gets. The YAML gives every number's source beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int
    height: int
    num_inference_steps: int
    num_frames: int = 1
    fps: int = 1
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    true_cfg_scale: float | None = None
    flow_shift: float | None = None
    strength: float | None = None
    negative_prompt: str | None = None


class ModelFamily(BaseModel):
    """One family: the diffusers pipeline for each task, the parameters that reach it, and its limits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    match: Match
    tasks: Mapping[str, str]
    """Diffusers pipeline class by task (the values of `pipelines.job.Task`)."""
    parameters: frozenset[str]
    """Sampling parameters the family's pipelines read, by their names in a request (`guidance_scale`, `flow_shift` …).
    A request that sets another is refused, and the error names it."""
    defaults: SamplingDefaults
    task_defaults: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    """What differs from `defaults` by task: the size of a video model's images, the strength of inpainting."""
    size_multiple: int = 16
    """Width and height the model computes are multiples of this; other sizes are computed larger and cropped."""
    frame_multiple: int = 1
    """Videos have `frame_multiple * k + 1` frames; other lengths are computed longer and trimmed."""
    max_sequence_length: int | None = None
    """Tokens that a prompt is truncated or padded to. None: the default of the family's pipelines."""
    max_images: int = 1
    """Input images one request may have."""
    sharded: bool = True
    """Whether its transformer can be sharded over several ranks."""

    def num_tokens(self, width: int, height: int, num_frames: int) -> int:
        """Tokens of the transformer's sequence for an output of this size, in pixels and frames: one for each square of
        `size_multiple` in each group of `frame_multiple` frames, where the first frame is a group of its own."""
        across, down = (math.ceil(side / self.size_multiple) for side in (width, height))
        return across * down * (1 + math.ceil((num_frames - 1) / self.frame_multiple))

    def defaults_for(self, task: str) -> SamplingDefaults:
        """The defaults of one task. An image is one frame, whatever length the family's videos have."""
        frames = {} if task.endswith("video") else {"num_frames": 1}
        return SamplingDefaults(**{**self.defaults.model_dump(), **frames, **self.task_defaults.get(task, {})})


class ModelCard(BaseModel):
    """What the engine tells the API about the model it serves."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    id: str
    """The id in `/v1/models`: `served_model_name`, else the model path."""
    pipeline_class: str
    family: ModelFamily
    dtype: str
    """Precision of the transformer: bf16, fp16 or fp32."""
    vae_dtype: str
    device: str
    num_gpus: int
    created: int
    """Unix seconds at which the model was loaded."""


@cache
def families() -> tuple[ModelFamily, ...]:
    """All families, the most specific match first."""
    files = (file for file in resources.files("configs").joinpath("models").iterdir() if file.name.endswith(".yaml"))
    loaded = [ModelFamily.model_validate(yaml.safe_load(file.read_text())) for file in files]
    return tuple(sorted(loaded, key=lambda family: (-family.match.specificity, family.name)))


def family_for(
    model_index: Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    component_configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> ModelFamily | None:
    """The family of a model, with the model's own overrides.

    Args:
        model_index: the model's `model_index.json`.
        overrides: the model's `ditserve.yaml`: fields of `ModelFamily` that replace its family's, mappings key by key.
            For a model of no known family they must define a complete one.
        component_configs: configuration files of components, by component, as far as they are known.

    Raises:
        pydantic.ValidationError: an override is not a field of `ModelFamily`, or the result is not a complete family.
    """
    known = next((family for family in families() if family.match(model_index, component_configs or {})), None)
    if not overrides:
        return known
    pipeline = model_index["_class_name"]
    family = known.model_dump() if known else {"name": pipeline, "match": {"pipelines": [pipeline]}}
    return ModelFamily.model_validate(_merged(family, overrides))


def family_in(directory: Path) -> ModelFamily | None:
    """The family of the model in this directory, or None when it is unknown.

    Reads `model_index.json`, the configuration files of components that any family asks about, and the model's
    `ditserve.yaml` if it has one. Raises as `family_for` does.
    """
    asked = {component for family in families() for component in family.match.component_config}
    files = [
        (component, directory / component / name)
        for component in asked
        for name in ("config.json", "scheduler_config.json")
    ]
    overrides = directory / "ditserve.yaml"
    return family_for(
        json.loads((directory / "model_index.json").read_text()),
        yaml.safe_load(overrides.read_text()) if overrides.exists() else None,
        {component: json.loads(file.read_text()) for component, file in files if file.exists()},
    )


def _merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `overrides`; where both have a mapping, the two are merged likewise."""
    both = {
        key: _merged(base[key], value)
        for key, value in overrides.items()
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
    }
    return {**base, **overrides, **both}
