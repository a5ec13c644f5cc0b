"""Wire models of requests: OpenAI's parameters, and SGLang's for diffusion.

Whatever a request's encoding, its fields arrive here as one dictionary (see `body.py`), so every field also takes its
text form: `"4"` for 4, `"true"`, JSON text for structures. `null` means the default. Unknown fields are ignored:
clients send OpenAI's `quality`, `style`, `user`, `background` or `moderation` to every server.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import from_json

from deployments.api.error_responses import invalid_field
from deployments.errors import APIError

MAX_OUTPUTS = 10
"""OpenAI's limit for `n`."""
MAX_SEED = 2**63 - MAX_OUTPUTS
"""`torch.Generator.manual_seed` takes 63 bits; the outputs of one request have consecutive seeds."""
MAX_PROMPT_LENGTH = 32_000
"""Characters; OpenAI's limit."""


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("Input should be a number")
    return value


def json_text(value: Any) -> Any:
    """Form fields hold structures as JSON text."""
    return from_json(value) if isinstance(value, str) and value.lstrip().startswith(("{", "[")) else value


def listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _single(value: Any) -> Any:
    """`mask[]` means the same as `mask`."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _size(value: Any) -> Any:
    if value == "auto":
        return None
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("it must be 'auto' or WIDTHxHEIGHT in pixels, such as '1024x1024'")
    return int(match[1]), int(match[2])


Integer = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[FiniteFloat, BeforeValidator(_no_bool)]
Size = Annotated[
    tuple[int, int] | None,
    BeforeValidator(_size),
    WithJsonSchema({"type": "string", "examples": ["auto", "1024x1024", "1280x720"]}),
]
_SEED = {"type": "integer", "minimum": 0, "maximum": MAX_SEED}
_SEEDS = {"type": "array", "items": _SEED, "minItems": 1, "maxItems": MAX_OUTPUTS}
Seeds = Annotated[
    list[Annotated[Integer, Field(ge=0, le=MAX_SEED)]] | None,
    BeforeValidator(lambda value: listed(json_text(value))),
    Field(min_length=1, max_length=MAX_OUTPUTS),
    WithJsonSchema({"anyOf": [_SEED, _SEEDS, {"type": "null"}]}),
]


class ImageReference(BaseModel):
    """An image by URL, in place of a file upload."""

    image_url: str | None = Field(
        None, description="A `data:` URL; one of http(s) where the server was started with `--allow-remote-media`."
    )
    file_id: str | None = Field(None, description="Not supported: this server keeps no uploaded files.")


InputImage = Annotated[bytes | ImageReference | str, BeforeValidator(json_text)]
"""An uploaded file, an `ImageReference`, or a bare data URL."""


class LoRAChoice(BaseModel):
    """One of a request's own adapters."""

    model_config = ConfigDict(extra="forbid")

    nickname: str | None = Field(None, min_length=1, description="A nickname, loaded before or given a `path` here.")
    path: str | None = Field(None, min_length=1, description="A .safetensors file, a folder or a Hugging Face repo id.")
    strength: Number = 1.0
    target: Annotated[list[str], BeforeValidator(listed)] = Field(
        default=["all"], description="Transformers it applies to: `all`, or names such as `transformer_2`."
    )

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.nickname is None and self.path is None:
            raise ValueError("an adapter needs a nickname or a path")
        return self


class WireRequest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Self:
        """The validated request. Raises `APIError` 400 that names the first wrong field."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise invalid_field(error.errors(include_url=False)) from None

    @model_validator(mode="before")
    @classmethod
    def _absent_fields(cls, fields: Any) -> Any:
        """Drop nulls and, except in prompts, empty strings of forms: both mean the default. Spread `extra_body` over
        the request, as the SDKs do themselves, when a client sends it as a field."""
        try:
            extra = json_text(fields.get("extra_body"))
        except ValueError as error:
            message = f"Invalid 'extra_body': it is not valid JSON: {error}"
            raise APIError(400, message, param="extra_body", code="invalid_value") from None
        merged = {**extra, **fields} if isinstance(extra, dict) else fields
        return {
            name: value
            for name, value in merged.items()
            if value is not None and (value != "" or name in ("prompt", "negative_prompt"))
        }


class GenerationRequest(WireRequest):
    """What image and video requests have in common."""

    prompt: str = Field(max_length=MAX_PROMPT_LENGTH, description="What to generate.")
    model: str | None = Field(None, description="Any name: the server has one model, and responds with its id.")
    n: Integer | None = Field(
        None, ge=1, le=MAX_OUTPUTS, description="Number of outputs. Default: 1, or one per given seed."
    )
    size: Size = Field(
        None, description="WIDTHxHEIGHT, or `auto`: the model's default size, in the shape of the input image if any."
    )
    width: Integer | None = Field(None, ge=1, description="Extension: overrides the width in `size`.")
    height: Integer | None = Field(None, ge=1, description="Extension: overrides the height in `size`.")

    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT_LENGTH, description="Extension: what to avoid.")
    seed: Seeds = Field(
        None,
        description="Extension: seed of the first output, from which the others count up, or a list of one seed per "
        "output. Default: random, and part of the response.",
    )
    num_inference_steps: Integer | None = Field(
        None, ge=1, le=1000, description="Extension: denoising steps. Schedulers know 1000 timesteps."
    )
    guidance_scale: Number | None = Field(
        None, ge=0, description="Extension: classifier-free guidance, or the embedded guidance of distilled models."
    )
    guidance_scale_2: Number | None = Field(
        None, ge=0, description="Extension: guidance of Wan 2.2's second, low-noise expert."
    )
    true_cfg_scale: Number | None = Field(
        None, ge=0, description="Extension: classifier-free guidance of models with embedded guidance."
    )
    flow_shift: Number | None = Field(None, gt=0, description="Extension: shift of the flow-matching noise schedule.")
    strength: Number | None = Field(
        None, ge=0, le=1, description="Extension: how far an edit may depart from its input image, 0 to 1."
    )
    timeout: Number | None = Field(
        None, gt=0, description="Extension: seconds until the job fails if it is not done, time in the queue included."
    )
    lora: Annotated[
        list[Annotated[str, Field(min_length=1)] | LoRAChoice] | None,
        BeforeValidator(lambda value: [json_text(item) for item in listed(json_text(value))]),
    ] = Field(
        None,
        description="Extension: this request's own adapters in place of the merged one: a nickname, an object with "
        "`nickname` or `path` and `strength`, or a list of them; an empty list for none.",
    )


class ImageRequest(GenerationRequest):
    """What generations and edits have in common."""

    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "webp", "jpeg"] = "png"
    output_compression: Integer = Field(100, ge=0, le=100, description="Quality of webp and jpeg.")
    stream: bool = Field(False, description="Respond with server-sent events.")
    partial_images: Integer = Field(0, ge=0, le=3, description="Previews to send before the image; streams only.")
    num_frames: Integer = Field(1, ge=1, le=1, description="Extension: images have one frame.")


class ImageGenerationRequest(ImageRequest):
    """Body of `POST /v1/images/generations`."""


class ImageEditRequest(ImageRequest):
    """Body of `POST /v1/images/edits`."""

    image: Annotated[list[InputImage], BeforeValidator(lambda value: listed(json_text(value)))] = Field(
        validation_alias=AliasChoices("image", "images"),
        min_length=1,
        max_length=16,
        description="One file or several (`image`, repeated, or `image[]`); `images` in a JSON body. PNG, WebP or JPEG "
        "of at most 50 MB each, unless the server has another limit.",
    )
    mask: Annotated[InputImage | None, BeforeValidator(_single)] = Field(
        None, description="PNG of the size of the first image, which is edited where the mask is transparent."
    )


class VideoRequest(GenerationRequest):
    """Body of `POST /v1/videos`."""

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_LENGTH, description="What to generate.")
    seconds: Number | None = Field(
        None, gt=0, description="Length of the video in seconds, as a number or a string. Default: the model's own."
    )
    fps: Integer | None = Field(None, ge=1, le=120, description="Extension: frames per second.")
    num_frames: Integer | None = Field(None, ge=1, description="Extension: overrides `seconds`.")
    input_reference: Annotated[InputImage | None, BeforeValidator(_single)] = Field(
        None, description="Image the video starts from: a file, or an object with `image_url`."
    )
