"""What each model family can do and how it is sampled by default, read from `configs/models/*.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field


class Match(BaseModel):
    """Which models belong to the family, judged by their `model_index.json` alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pipelines: tuple[str, ...]
    """Names of diffusers pipeline classes (`_class_name`)."""
    config: Mapping[str, Any] = Field(default_factory=dict)
    """Further entries `model_index.json` must have with these values."""
    components: tuple[str, ...] = ()
    """Components the model must really have (an absent one is listed as `[null, null]`)."""

    def __call__(self, model_index: Mapping[str, Any]) -> bool:
        return (
            model_index["_class_name"] in self.pipelines
            and all(model_index.get(key) == value for key, value in self.config.items())
            and all(model_index.get(name, [None])[0] is not None for name in self.components)
        )

    @property
    def specificity(self) -> int:
        return len(self.config) + len(self.components)


class SamplingDefaults(BaseModel):
    """What a request that names nothing but a prompt gets. Every number's source stands beside it in the YAML."""

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
    A request that sets another is refused by name."""
    defaults: SamplingDefaults
    image_defaults: Mapping[str, Any] = Field(default_factory=dict)
    """What differs from `defaults` when a video model is asked for one picture."""
    size_multiple: int = 16
    """Width and height the model computes are multiples of this; other sizes are computed larger and cropped."""
    frame_multiple: int = 1
    """Clips have `frame_multiple * k + 1` frames; other lengths are computed longer and trimmed."""
    max_images: int = 1
    """Input images one request may have."""
    sharded: bool = True
    """Whether its transformer can be sharded over several ranks."""

    def defaults_for(self, task: str) -> SamplingDefaults:
        """The defaults of one task: pictures of a video model have their own."""
        if not task.endswith("video") and self.image_defaults:
            return SamplingDefaults(**{**self.defaults.model_dump(), **self.image_defaults})
        return self.defaults


class ModelCard(BaseModel):
    """What the engine tells the API about the model it serves."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    id: str
    """The id in `/v1/models`: `served_model_name`, else the model path."""
    pipeline_class: str
    family: ModelFamily
    dtype: str
    """Precision of the transformer: bf16, fp16 or fp32."""
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


def family_of(model_index: Mapping[str, Any]) -> ModelFamily | None:
    """The family of a model with this `model_index.json`, or None when it is none that we know."""
    return next((family for family in families() if family.match(model_index)), None)
