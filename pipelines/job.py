"""A job as a value, with everything that decides its pixels, and the events that computing it yields.

Standard library and pydantic only, so that the HTTP process can build jobs without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256

from pydantic import BaseModel, ConfigDict, Field


class Task(StrEnum):
    """What a job asks of a model. A model's family lists the tasks it can do."""

    TEXT_TO_IMAGE = "text_to_image"
    IMAGE_EDIT = "image_edit"
    """A new image from a prompt and one or several images."""
    INPAINT = "inpaint"
    """An image edit that a mask confines to a part of the first image."""
    TEXT_TO_VIDEO = "text_to_video"
    IMAGE_TO_VIDEO = "image_to_video"

    @property
    def is_video(self) -> bool:
        return self in (Task.TEXT_TO_VIDEO, Task.IMAGE_TO_VIDEO)


class LoRASpec(BaseModel):
    """One adapter as a job uses it. A tuple of them is a composition, merged as a unit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nickname: str
    identity: str
    """Names the exact weights (path, size and mtime, or repo and revision): the key of the factor cache."""
    strength: float = 1.0
    target: tuple[str, ...] = ("all",)
    """Transformers it applies to: `all`, or names such as `transformer`, `transformer_2`."""


class Job(BaseModel):
    """A request with every default filled in. Equal jobs give equal pixels, on any replica, at any time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    task: Task
    prompt: str
    negative_prompt: str | None = None
    width: int
    height: int
    num_frames: int = 1
    fps: int = 1
    num_inference_steps: int
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    """Guidance of Wan 2.2's low-noise expert; None takes `guidance_scale`."""
    true_cfg_scale: float | None = None
    flow_shift: float | None = None
    strength: float | None = None
    """How far an edit may leave its source image: 0 keeps it, 1 ignores it."""
    seeds: tuple[int, ...]
    """One output per seed, computed one after the other, so that an output depends on its own seed alone."""
    images: tuple[str, ...] = ()
    """Content keys (see `content_key`) of the input images."""
    mask: str | None = None
    """Content key of the mask: a PNG whose transparent pixels are to be edited."""
    lora: tuple[LoRASpec, ...] = ()
    output_format: str = "png"
    """png, webp, jpeg or mp4."""
    output_compression: int = Field(default=100, ge=0, le=100)
    """Quality of webp and jpeg, 0 to 100."""
    partial_images: int = Field(default=0, ge=0, le=3)
    """Number of previews to produce on the way."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds, waiting included, after which the job fails if it is not done. No pixel depends on it."""


Media = Mapping[str, bytes]
"""The bytes of a job's inputs, by content key. They are passed alongside the job, by reference."""


def content_key(data: bytes) -> str:
    """The key under which a job names these bytes."""
    return sha256(data).hexdigest()


@dataclass(frozen=True)
class Progress:
    """One denoising step is done."""

    step: int
    """Steps done, over all outputs of the job."""
    total: int
    """Steps in all."""


@dataclass(frozen=True)
class Preview:
    """An image of the unfinished latents, encoded in the job's output format."""

    index: int
    """0-based number of this preview."""
    data: bytes


@dataclass(frozen=True)
class Output:
    """One finished image or video, encoded."""

    data: bytes
    thumbnail: bytes | None = None
    """WebP of the first frame; videos only."""
    spritesheet: bytes | None = None
    """JPEG of frames in a grid; videos only."""


@dataclass(frozen=True)
class Result:
    """The last event of a generation."""

    outputs: tuple[Output, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time by stage: encode, denoise, decode, media."""


@dataclass(frozen=True)
class OutputDone:
    """In a gang, an output other than the last is done: all ranks have run its steps, and rank 0 has encoded it."""


Event = Progress | Preview | OutputDone | Result


class FailedAlone(Exception):
    """Rank 0 of a gang failed (see `__cause__`) in work of its own, while the others run on to where all agree."""


class InvalidJob(ValueError):
    """The job asks for something the model or the input cannot provide: the client's error, not the server's."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type[InvalidJob], tuple[str, str | None]]:
        return type(self), (str(self), self.param)
