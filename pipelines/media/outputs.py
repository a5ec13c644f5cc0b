"""From decoded pixels to encoded bytes, one frame at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pipelines.job import Job, Output
from pipelines.media.canvas import Canvas
from pipelines.media.encode import (
    Frame,
    encode_image,
    encode_spritesheet,
    encode_thumbnail,
    encode_video,
    spritesheet_indices,
)


def asked_frames(pixels: torch.Tensor, job: Job, canvas: Canvas) -> torch.Tensor:
    """Convert a pipeline's output, `(1, 3, H, W)` or `(1, F, 3, H, W)`, to the frames and size the job asks for.

    Some pipelines compute another size than the canvas: Qwen-Image-Edit always inpaints at about one megapixel in the
    canvas's shape, FLUX.2 klein at one megapixel at most. They stretch the source to that size, so the whole output is
    stretched back.

    Returns:
        `(F, 3, H, W)`
    """
    clip = pixels[0] if pixels.dim() == 5 else pixels
    size = canvas.height, canvas.width
    if clip.shape[-2:] != size:
        # Antialiased: from a megapixel to 256x256, each output pixel averages 16. Clamped: bicubic overshoots at edges.
        clip = F.interpolate(clip.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
    return clip[: job.num_frames, :, : job.height, : job.width]


def to_frame(pixels: torch.Tensor) -> Frame:
    """`(3, H, W)` in [0, 1] to bytes, as diffusers rounds them."""
    return (pixels.float() * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()


def encode_output(pixels: torch.Tensor, job: Job, canvas: Canvas) -> Output:
    """An image in the job's format, or a video with its thumbnail and spritesheet."""
    clip = asked_frames(pixels, job, canvas)
    if not job.task.is_video:
        return Output(encode_image(to_frame(clip[0]), job.output_format, job.output_compression))
    return Output(
        data=encode_video((to_frame(frame) for frame in clip), job.fps),
        thumbnail=encode_thumbnail(to_frame(clip[0])),
        spritesheet=encode_spritesheet([to_frame(clip[index]) for index in spritesheet_indices(len(clip))]),
    )
