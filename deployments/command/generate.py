"""`ditserve generate`: one request, computed in this process, without Ray or a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tqdm import tqdm

from configs.model_family import ModelCard
from configs.server_args import ServerArgs
from deployments.api.jobs import Submission, image_submission, video_submission
from deployments.api.protocol.requests import (
    ImageEditRequest,
    ImageGenerationRequest,
    ImageRequest,
    VideoRequest,
)
from deployments.api.services import Services
from deployments.errors import APIError
from deployments.interfaces import Engine, LoRARequest, State
from pipelines.job import Event, Job, LoRASpec, Media, Progress, Result, Task

if TYPE_CHECKING:
    from pipelines.model.load import Model

CLIP_FIELDS = ("seconds", "num_frames", "fps")
"""Request fields that only videos have."""

SAMPLING_FIELDS = (
    "prompt",
    "negative_prompt",
    "n",
    "size",
    "width",
    "height",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "true_cfg_scale",
    "flow_shift",
    "strength",
    *CLIP_FIELDS,
)
"""Request fields that are flags of the command, named as in the API."""

MODEL_FIELDS = (
    "model_path",
    "device",
    "dtype",
    "attention_backend",
    "enable_torch_compile",
    "text_encoder_cpu_offload",
    "vae_cpu_offload",
    "dit_cpu_offload",
    "dit_layerwise_offload",
    "pin_cpu_memory",
    "lora_path",
    "lora_scale",
)
"""Server arguments that are flags of the command: those that concern one rank."""

IMAGE_FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}


class OneRank:
    """`interfaces.Engine` on a model in this process, and as much of `interfaces.State` as a request needs."""

    def __init__(self, model: Model):
        self._model = model

    async def card(self) -> ModelCard:
        return self._model.card

    async def generate(self, job: Job, media: Media, *, progress: bool) -> AsyncGenerator[Event, None]:
        from pipelines.generation.generation import generate

        for event in generate(self._model, job, media):
            if progress or not isinstance(event, Progress):
                yield event

    async def lora_for_job(self, requests: Sequence[LoRARequest] | None) -> tuple[LoRASpec, ...]:
        """None: the adapter from the command line, if any, is already merged."""
        return ()


def generate_files(
    args: ServerArgs, output_path: Path, image_paths: Sequence[Path], fields: Mapping[str, str]
) -> list[Path]:
    """Generate what `fields`, named as in the API, ask for, and return the files written.

    Args:
        output_path: a file, whose suffix decides between an image and a video; or a folder, which gets a video from a
            model that makes videos, and an image from any other.
        image_paths: input images.

    Raises:
        APIError, InvalidJob, ValueError: the request, an adapter or the model is unusable; the message says why.
    """
    suffix = output_path.suffix.lower()
    if suffix not in ("", ".mp4", *IMAGE_FORMATS):
        raise ValueError(f"'{output_path}' ends in neither .mp4 nor {', '.join(IMAGE_FORMATS)}")
    images = [path.read_bytes() for path in image_paths]
    image_format = IMAGE_FORMATS.get(suffix)
    wanted = _request(image_format, images, fields)  # before the model is loaded, which may take minutes
    model = load(args)
    if suffix == "" and not any(Task(task).is_video for task in model.card.family.tasks):
        wanted = _request("png", images, fields)
    rank = OneRank(model)
    services = Services(args, cast(Engine, rank), cast(State, rank))
    submission = asyncio.run(_submission(wanted, services))
    result = asyncio.run(_with_progress_bar(rank, submission))
    return _write(output_path, submission.job, result)


def load(args: ServerArgs) -> Model:
    """The model on one rank, with the adapter of `--lora-path` merged."""
    from lora.load import load as load_adapter
    from lora.load import resolve
    from lora.merge import Merger
    from pipelines.model.load import load_model

    model = load_model(args)
    if args.lora_path is not None:
        factors = load_adapter(resolve(args.lora_path), type(model.pipeline), model.transformers)
        Merger(model.transformers).merge([(factors, args.lora_scale, ("all",))])
    return model


def _request(image_format: str | None, images: list[bytes], fields: Mapping[str, str]) -> VideoRequest | ImageRequest:
    """The API request for an image, or without a format for a video. Raises `APIError` for a wrong field."""
    if image_format is None:
        if len(images) > 1:
            raise APIError(400, "A video starts from one image", param="image_path")
        reference = {"input_reference": images[0]} if images else {}
        return VideoRequest.parse({**fields, **reference})
    if of_videos := [name for name in CLIP_FIELDS if name in fields]:
        raise APIError(400, f"An image has no {' and no '.join(of_videos)}", param=of_videos[0])
    asked = {**fields, "output_format": image_format}
    return ImageEditRequest.parse({**asked, "image": images}) if images else ImageGenerationRequest.parse(asked)


async def _submission(wanted: VideoRequest | ImageRequest, services: Services) -> Submission:
    if isinstance(wanted, VideoRequest):
        return await video_submission(wanted, services)
    return await image_submission(wanted, services)


async def _with_progress_bar(rank: OneRank, submission: Submission) -> Result:
    with tqdm(unit="step", desc=submission.job.task) as bar:
        async with aclosing(rank.generate(submission.job, submission.media, progress=True)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    bar.total = event.total
                    bar.update(event.step - bar.n)
                elif isinstance(event, Result):
                    return event
    raise RuntimeError("the generation ended without a result")


def _write(output_path: Path, job: Job, result: Result) -> list[Path]:
    """Write one file per output, numbered if there are several."""
    if not output_path.suffix:
        output_path = output_path / f"{job.id}.{job.output_format}"
    output_path.parent.mkdir(parents=True, exist_ok=True)
    paths = [output_path]
    if len(result.outputs) > 1:
        paths = [output_path.with_stem(f"{output_path.stem}-{index}") for index in range(len(result.outputs))]
    for path, output in zip(paths, result.outputs, strict=True):
        path.write_bytes(output.data)
    return paths
