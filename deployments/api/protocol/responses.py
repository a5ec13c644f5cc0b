"""Wire models of responses. Fields that OpenAI's lack are marked as extensions; every client accepts them.

For an empty field, OpenAI's schema wants an absent key in images and a null in videos. Images are therefore dumped with
`exclude_none`, videos in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class WireResponse(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class ErrorObject(WireResponse):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(WireResponse):
    """Every response with a status of 400 or above."""

    error: ErrorObject
    detail: str = Field(description="The message again, where clients of FastAPI servers look for it.")


class ImageData(WireResponse):
    b64_json: str | None = None
    url: str | None = None
    seed: int = Field(description="Extension: the seed that gives this output again.")


class ImagesResponse(WireResponse):
    id: str = Field(description="Extension: names the images in `GET /v1/images/{id}/content`.")
    created: int
    background: Literal["opaque"] = "opaque"
    output_format: str
    size: str
    data: list[ImageData]
    timings: Mapping[str, float] = Field(description="Extension: seconds by stage.")


class InputTokensDetails(WireResponse):
    image_tokens: int = 0
    text_tokens: int = 0


class Usage(WireResponse):
    """Diffusion models count no tokens, but OpenAI's clients require the object in the last event of a stream."""

    input_tokens: int = 0
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class ImageEvent(WireResponse):
    """What the two events of an image stream have in common."""

    b64_json: str
    background: Literal["opaque"] = "opaque"
    created_at: int
    output_format: str
    quality: Literal["auto"] = "auto"
    size: str


class PartialImageEvent(ImageEvent):
    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int


class CompletedImageEvent(ImageEvent):
    type: Literal["image_generation.completed", "image_edit.completed"]
    usage: Usage = Usage()
    seed: int = Field(description="Extension: the seed that gives this output again.")


class VideoErrorObject(WireResponse):
    code: str
    message: str


class VideoObject(WireResponse):
    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str | None
    size: str
    seconds: str
    remixed_from_video_id: None = None
    error: VideoErrorObject | None
    n: int = Field(
        description="Extension: number of outputs; all but the first are at `GET …/content?variant=1`, 2, …."
    )
    seeds: list[int] = Field(description="Extension: the seed of each output.")
    num_frames: int = Field(description="Extension.")
    fps: int = Field(description="Extension.")
    num_inference_steps: int = Field(description="Extension.")
    timings: Mapping[str, float] = Field(description="Extension: seconds by stage, once completed.")


class VideoList(WireResponse):
    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(WireResponse):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class ModelObject(WireResponse):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["ditserve"] = "ditserve"
    root: str
    parent: None = None
    num_gpus: int = Field(description="Extension, as are all that follow: ranks the model is spread over.")
    task_type: str = Field(description="T2V, I2V, TI2V, T2I, I2I or TI2I.")
    supported_task_types: list[str]
    dit_precision: str
    vae_precision: str
    pipeline_class: str
    family: str
    device: str


class ModelList(WireResponse):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class AppliedLoRA(WireResponse):
    nickname: str
    strength: float
    target: list[str]


class LoadedAdapter(WireResponse):
    nickname: str
    path: str
    rank: int
    num_bytes: int


class ActiveAdapters(WireResponse):
    """The composition on one transformer. `nickname` and `path` join those of all adapters, `strength` is the first."""

    nickname: str
    nicknames: list[str]
    path: str
    merged: bool
    mode: Literal["merged", "unmerged"]
    strength: float
    strengths: list[float]


class LoRAList(WireResponse):
    loaded_adapters: list[LoadedAdapter]
    active: dict[str, list[ActiveAdapters]] = Field(
        description="By transformer: what is merged, or was set and then unmerged. A list, as SGLang has it, of one."
    )
    replicas: dict[str, list[AppliedLoRA]] = Field(
        description="Extension: what is merged into the weights of each engine replica right now."
    )
    num_bytes_held: dict[str, int]
    """By replica: host memory in which each rank keeps the original weights, to restore them bit for bit."""


class LoRAResponse(LoRAList):
    """Response of the routes that change adapters: SGLang's two fields, then the current state."""

    status: Literal["ok"] = "ok"
    message: str


class Health(WireResponse):
    status: Literal["ok", "ready"]
