"""From a request to a job: fills in every default, and refuses by name what the model cannot do."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from configs.model_family import ModelCard, ModelFamily, SamplingDefaults
from configs.server_args import ServerArgs
from deployments import log
from deployments.api.inputs import Upload, input_image, input_mask
from deployments.api.keys import Caller
from deployments.api.protocol.requests import (
    GenerationRequest,
    ImageEditRequest,
    ImageRequest,
    LoRAChoice,
    VideoRequest,
)
from deployments.api.services import Services
from deployments.errors import APIError
from deployments.interfaces import LoRARequest
from pipelines.job import Job, LoRASpec, Media, Task

MAX_RANDOM_SEED = 2**32
"""Seeds drawn for clients stay below this, so that any JSON parser reads them exactly (doubles hold 53 bits)."""

MAX_SIDE = 16_383
"""Most pixels on the longer side of an output: WebP's limit. x264 takes one more, JPEG four times as many."""

MAX_ASPECT_RATIO = 3.0
"""Limit for an output whose size the request leaves open: what OpenAI's models allow in `size`."""

FAMILY_PARAMETERS = (
    "negative_prompt",
    "guidance_scale",
    "guidance_scale_2",
    "true_cfg_scale",
    "flow_shift",
    "strength",
)
"""Parameters that only some families read; `ModelFamily.parameters` says which."""


@dataclass(frozen=True)
class Submission:
    """A job and the bytes of its inputs."""

    job: Job
    media: Media


async def image_submission(wanted: ImageRequest, services: Services) -> Submission:
    """Raises `APIError` and `InvalidJob`, naming the parameter at fault."""
    card = await services.engine.card()
    images: list[Upload] = []
    mask = None
    if isinstance(wanted, ImageEditRequest):
        task = Task.IMAGE_EDIT if wanted.mask is None else Task.INPAINT
        param = "image" if wanted.mask is None else "mask"
        _require(card, task, param, f"{param} is")
        if len(wanted.image) > card.family.max_images:
            raise _refused("image", f"{card.id} takes at most {card.family.max_images} input image(s)")
        images = [await input_image(image, "image", services.args) for image in wanted.image]
        mask = None if wanted.mask is None else await input_mask(wanted.mask, images[0], services.args)
    else:
        task = Task.TEXT_TO_IMAGE
        _require(card, task, None, "an image from a prompt alone is")
    return await _submission(
        f"img_{uuid4().hex}",
        task,
        wanted,
        services,
        images,
        mask,
        output_format=wanted.output_format,
        output_compression=wanted.output_compression,
        partial_images=wanted.partial_images if wanted.stream else 0,
    )


async def video_submission(wanted: VideoRequest, services: Services) -> Submission:
    """Raises `APIError` and `InvalidJob`, naming the parameter at fault."""
    card = await services.engine.card()
    if not any(Task(name).is_video for name in card.family.tasks):
        raise _refused("model", f"{card.id} makes no videos. It can do: {_abilities(card)}")
    images: list[Upload] = []
    if wanted.input_reference is None:
        task = Task.TEXT_TO_VIDEO
        _require(card, task, "input_reference", "a video without input_reference is")
    else:
        task = Task.IMAGE_TO_VIDEO
        _require(card, task, "input_reference", "input_reference is")
        images = [await input_image(wanted.input_reference, "input_reference", services.args)]

    defaults = card.family.defaults_for(task)
    fps = wanted.fps or defaults.fps
    num_frames = wanted.num_frames or defaults.num_frames
    if wanted.num_frames is None and wanted.seconds is not None:
        # Bounded before it is rounded: 1e308 seconds are infinitely many frames.
        num_frames = max(1, round(min(wanted.seconds * fps, services.args.max_frames + 1)))
    if num_frames > services.args.max_frames:
        param = "seconds" if wanted.num_frames is None else "num_frames"
        raise _refused(param, f"more frames are asked for than the {services.args.max_frames} that are made at most")
    return await _submission(
        f"video_{uuid4().hex}",
        task,
        wanted,
        services,
        images,
        output_format="mp4",
        num_frames=num_frames,
        fps=fps,
    )


async def _submission(
    job_id: str,
    task: Task,
    wanted: GenerationRequest,
    services: Services,
    images: list[Upload],
    mask: Upload | None = None,
    **output: Any,
) -> Submission:
    log.job_id.set(job_id)
    card = await services.engine.card()
    defaults = card.family.defaults_for(task)
    default_size = defaults.width, defaults.height
    if images:
        default_size = size_like(images[0].size, default_size, card.family.size_multiple)
    width, height = _frame_size(wanted, default_size, services.args.max_pixels, card.family.size_multiple)
    _require_tokens(services.args.parallel.sp_degree, wanted, card.family, width, height, output.get("num_frames", 1))
    job = Job(
        id=job_id,
        task=task,
        prompt=wanted.prompt,
        width=width,
        height=height,
        num_inference_steps=wanted.num_inference_steps or defaults.num_inference_steps,
        seeds=_seeds(wanted),
        timeout=wanted.timeout,
        images=tuple(image.key for image in images),
        mask=mask and mask.key,
        **_family_parameters(wanted, card, task, defaults),
        lora=await _adapters(wanted, services),
        **output,
    )
    inputs = images if mask is None else [*images, mask]
    return Submission(job, {upload.key: upload.data for upload in inputs})


async def _adapters(wanted: GenerationRequest, services: Services) -> tuple[LoRASpec, ...]:
    """The request's own adapters, or the default ones. Errors that name a `set_lora` parameter name `lora` instead."""
    requests = None if wanted.lora is None else _lora_requests(wanted.lora)
    try:
        return await services.state.lora_for_job(requests)
    except APIError as error:
        param = error.param and "lora"
        raise APIError(error.status, error.message, param=param, code=error.code, headers=error.headers) from None


def _require(card: ModelCard, task: Task, param: str | None, what: str) -> None:
    if task not in card.family.tasks:
        raise APIError(
            400,
            f"{what} not supported by {card.id}. It can do: {_abilities(card)}",
            param=param,
            code="unsupported_task",
        )


def _abilities(card: ModelCard) -> str:
    return ", ".join(sorted(card.family.tasks))


def size_like(image: tuple[int, int], default: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Width and height of an output in the shape of `image`, at the cost of `default`.

    Both are multiples of `multiple`, the area is at most that of `default`, and the aspect ratio at most
    `MAX_ASPECT_RATIO`. Diffusers' Wan image-to-video examples and its Qwen-Image-Edit pipeline do the same.
    """
    aspect_ratio = min(max(image[0] / image[1], 1 / MAX_ASPECT_RATIO), MAX_ASPECT_RATIO)
    height = math.sqrt(default[0] * default[1] / aspect_ratio)
    width, height = (
        # The small term is for a root that should be whole but comes out slightly below.
        max(1, int(side / multiple + 1e-9)) * multiple
        for side in (height * aspect_ratio, height)
    )
    return width, height


def _frame_size(wanted: GenerationRequest, default: tuple[int, int], max_pixels: int, multiple: int) -> tuple[int, int]:
    """Width and height. A side shorter than `multiple`, the model's unit, costs as much as one of that length."""
    width, height = wanted.size or default
    width, height = wanted.width or width, wanted.height or height
    if max(width, height) > MAX_SIDE:
        raise _refused(_size_param(wanted), f"{width}x{height} is asked for; a side has at most {MAX_SIDE} pixels")
    if width * height < 1 or max(width, multiple) * max(height, multiple) > max_pixels:
        raise _refused(
            _size_param(wanted),
            f"{width}x{height} is asked for; a frame has 1 to {max_pixels} pixels, "
            f"where a side shorter than {multiple} counts as {multiple}",
        )
    return width, height


def _require_tokens(
    ranks: int, wanted: GenerationRequest, family: ModelFamily, width: int, height: int, num_frames: int
) -> None:
    """Require a token for each rank that shares the sequence: some transformers fail on an empty shard, and a rank that
    fails alone breaks its gang."""
    num_tokens = family.num_tokens(width, height, num_frames)
    if num_tokens < ranks:
        raise _refused(
            _size_param(wanted),
            f"{width}x{height} is {num_tokens} token(s) of {family.size_multiple}x{family.size_multiple} pixels, "
            f"fewer than the {ranks} ranks that are to share them",
        )


def _size_param(wanted: GenerationRequest) -> str:
    """The parameter that an output's size comes from."""
    if wanted.width is not None:
        return "width"
    return "size" if wanted.height is None else "height"


def _seeds(wanted: GenerationRequest) -> tuple[int, ...]:
    """One seed per output: as listed, counting up from the one given, or from a random one."""
    given = wanted.seed or [secrets.randbelow(MAX_RANDOM_SEED)]
    if len(given) > 1:
        if wanted.n not in (None, len(given)):
            raise _refused("seed", f"{len(given)} seeds are given for n = {wanted.n} outputs")
        return tuple(given)
    return tuple(range(given[0], given[0] + (wanted.n or 1)))


def _family_parameters(
    wanted: GenerationRequest, card: ModelCard, task: Task, defaults: SamplingDefaults
) -> dict[str, Any]:
    """The parameters that only some families read, each as set by the client or by the family's default."""
    values: dict[str, Any] = {}
    for name in FAMILY_PARAMETERS:
        value = getattr(wanted, name)
        if value not in (None, "") and name not in card.family.parameters:
            readable = ", ".join(sorted(card.family.parameters & set(FAMILY_PARAMETERS))) or "none of its kind"
            raise _refused(name, f"{card.id} does not read it. It reads: {readable}")
        values[name] = value if value is not None else getattr(defaults, name)
    if task in (Task.TEXT_TO_IMAGE, Task.TEXT_TO_VIDEO):
        if wanted.strength is not None:
            raise _refused("strength", "it says how far an output may leave an input image, and none is given")
        values["strength"] = None
    return values


def require_right_to_load(caller: Caller, choices: list[str | LoRAChoice] | None, args: ServerArgs) -> None:
    """Require an admin for adapters given by path, unless there is a folder for adapters.

    Anybody may use adapters that are loaded or in that folder. Without a folder, a path could make the server read
    anything on its disk or the Hugging Face Hub.

    Raises:
        APIError: 401 or 403; a choice has a path, and the caller is not an admin.
    """
    has_path = any(isinstance(choice, LoRAChoice) and choice.path is not None for choice in choices or ())
    if has_path and args.lora_dir is None:
        caller.require_admin("An adapter by its path")


def _lora_requests(choices: list[str | LoRAChoice]) -> list[LoRARequest]:
    named = [LoRAChoice(nickname=choice) if isinstance(choice, str) else choice for choice in choices]
    return [
        LoRARequest(
            # Without a nickname the path is the name, so equal paths are the same adapter.
            nickname=choice.nickname or str(choice.path),
            path=choice.path,
            strength=choice.strength,
            target=tuple(choice.target),
        )
        for choice in named
    ]


def _refused(param: str, reason: str) -> APIError:
    return APIError(400, f"Invalid '{param}': {reason}", param=param, code="invalid_value")
