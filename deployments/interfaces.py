"""What the rooms need from each other, as protocols and the values that cross them.

The engine computes jobs and reads adapters; the state actor remembers videos, stored content and adapters. The API and
the state are written against these protocols alone; `deployments/app.py` gives them the Serve handle and the actor.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

from configs.model_family import ModelCard
from pipelines.job import Event, Job, LoRASpec, Media


class VideoStatus(StrEnum):
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True)
class VideoError:
    code: str
    message: str


@dataclass(frozen=True)
class Video:
    """The current state of a video job."""

    job: Job
    """Its id is the video's id."""
    model: str
    status: VideoStatus
    progress: int
    """Whole percent of denoising steps done: below 100 until the file can be downloaded."""
    created_at: int
    """Unix seconds, as are the next two."""
    completed_at: int | None = None
    expires_at: int | None = None
    error: VideoError | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage (queue, encode, denoise, decode, media) of a completed job."""

    @property
    def finished(self) -> bool:
        return self.status in (VideoStatus.COMPLETED, VideoStatus.FAILED)


@dataclass(frozen=True)
class VideoPage:
    videos: tuple[Video, ...]
    has_more: bool


Composition = tuple[LoRASpec, ...]
"""Adapters with their strengths, as they are merged together."""

Variant = Literal["video", "thumbnail", "spritesheet"]


@dataclass(frozen=True)
class Content:
    """A stored file, to be read in ranges."""

    key: str
    """What `State.read` takes. Never a path, never shown to a client."""
    size: int
    media_type: str
    filename: str
    """Name offered to the client for the download."""


@dataclass(frozen=True)
class LoRARequest:
    """One adapter as a client requests it."""

    nickname: str
    path: str | None = None
    """File, folder or Hugging Face repo id; None for a nickname that was loaded before."""
    strength: float = 1.0
    target: tuple[str, ...] = ("all",)


@dataclass(frozen=True)
class LoadedLoRA:
    nickname: str
    path: str
    num_bytes: int
    rank: int
    """The largest rank among its layers."""


@dataclass(frozen=True)
class ActiveLoRA:
    """What is merged into one transformer, or would be by `merge_lora_weights`."""

    adapters: tuple[LoRASpec, ...]
    merged: bool
    """Whether new jobs get it."""


@dataclass(frozen=True)
class LoRAStatus:
    loaded: tuple[LoadedLoRA, ...]
    default: tuple[LoRASpec, ...]
    """What new jobs get if they name no adapters of their own."""
    active: Mapping[str, ActiveLoRA]
    """By transformer: the default, and what was set and then unmerged."""
    replicas: Mapping[str, tuple[LoRASpec, ...]]
    """What is merged into the weights of each engine replica right now."""
    num_bytes_held: Mapping[str, int] = field(default_factory=dict)
    """Host memory in which each rank of a replica keeps the original weights of merged layers."""
    notes: tuple[str, ...] = ()
    """Notes for the client on this call: a file that changed and was loaded again, a target that was ignored."""


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that an engine replica has read, converted and found to fit the model."""

    identity: str
    factors: Any
    """What the engine needs to merge it. Opaque here: `lora.factors.Factors.to_bytes()` in the object store."""
    rank: int
    num_bytes: int
    transformers: tuple[str, ...] = ("transformer",)
    """The model's transformers that it has factors for."""


class AdapterLoader(Protocol):
    """Reads adapters where the model is. Both raise `APIError` 400 (code `invalid_lora`) for an unusable adapter."""

    async def identify_lora(self, path: str) -> str:
        """The identity of the adapter now at `path`, without loading it."""

    async def load_lora(self, path: str) -> LoadedAdapter: ...


class Engine(Protocol):
    """Computes jobs. Any method may raise `APIError`."""

    async def card(self) -> ModelCard:
        """The served model. Raises `APIError` 503 while it is still loading."""

    def generate(self, job: Job, media: Media, *, progress: bool) -> AsyncGenerator[Event, None]:
        """Compute `job`; the last event is its `Result`. With `progress`, a `Progress` of step 0 comes when the
        computation begins (and again if the ranks died), then one for the last step and for others at least 0.1 s
        apart.

        Closing the iterator (or cancelling the task that reads it) frees the ranks within one denoising step.
        Raises `InvalidJob` for what only the pipeline itself can refuse.
        """

    async def ready(self) -> None:
        """Return once every rank has answered. Raises `APIError` 503 that says what is wrong."""


class State(Protocol):
    """Remembers. Any method may raise `APIError`: 404 for an unknown id, for instance.

    Records belong to the tenant that created them (`keys.Caller.tenant`) and do not exist for other tenants. Tenant
    None sees all records; its own are seen by no other.
    """

    async def create_video(
        self, job: Job, media: Media, model: str, idempotency_key: str | None = None, tenant: str | None = None
    ) -> Video:
        """Persist a job as queued and have it run. A tenant's repeated idempotency key returns the same video.

        Raises `APIError` 429 when too many are unfinished.
        """

    async def get_video(self, video_id: str, tenant: str | None = None) -> Video: ...

    async def list_videos(
        self, after: str | None, limit: int, order: Literal["asc", "desc"], tenant: str | None = None
    ) -> VideoPage: ...

    async def cancel_video(self, video_id: str, tenant: str | None = None) -> Video:
        """Stop the job if it is queued or running; it then fails with code `cancelled`. A finished one stays."""

    async def delete_video(self, video_id: str, tenant: str | None = None) -> None:
        """Stop the job if it is queued or running; delete its record and its files."""

    async def video_content(
        self, video_id: str, variant: Variant, index: int = 0, tenant: str | None = None
    ) -> Content:
        """Raises `APIError` 404 while the job is unfinished, and for a failed one with the reason."""

    async def store_image(self, job: Job, outputs: Sequence[bytes], tenant: str | None = None) -> None: ...

    async def image_content(self, image_id: str, index: int = 0, tenant: str | None = None) -> Content: ...

    async def read(self, key: str, offset: int, length: int) -> bytes: ...

    async def set_lora(self, requests: Sequence[LoRARequest]) -> LoRAStatus:
        """Load and validate adapters, merge them on every replica and make them the default for new jobs. One
        `LoRARequest` per adapter of the composition. Raises `APIError` 409 while another is merged (unless
        `lora_switch` is `auto`), 4xx for a bad adapter; what was active stays active."""

    async def merge_lora(self, strength: float | None = None, target: tuple[str, ...] | None = None) -> LoRAStatus:
        """Merge again what was set, with the strengths and targets it was set with unless given here."""

    async def unmerge_lora(self, target: tuple[str, ...] | None = None) -> LoRAStatus: ...

    async def delete_lora(self, nickname: str) -> LoRAStatus:
        """Free a nickname and its factors. Raises `APIError` 404 for an unknown one, 409 while it is merged."""

    async def list_loras(self) -> LoRAStatus: ...

    async def lora_for_job(self, requests: Sequence[LoRARequest] | None) -> tuple[LoRASpec, ...]:
        """The adapters a new job runs with: those it requests, loaded if necessary, or (None) the default."""
