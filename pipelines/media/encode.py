"""From images and videos to bytes, with Pillow, NumPy and PyAV.

A frame is a uint8 array of shape `(H, W, 3)`, RGB. Videos are encoded frame by frame: none is ever held as a list.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray
from PIL import Image

Frame = NDArray[np.uint8]

THUMBNAIL_EDGE = 320
SPRITE_EDGE = 160
SPRITESHEET_FRAMES = 16


def encode_image(image: Image.Image | Frame, image_format: str, compression: int = 100) -> bytes:
    """Encode one image as `png`, `webp` or `jpeg`.

    Args:
        compression: quality of webp and jpeg, 0 to 100. PNG is lossless and ignores it.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    options: dict[str, Any]
    match image_format:
        case "png":
            # 1024x1024, one core: 0.16 s at level 1, 0.26 s at Pillow's default 6 for a file 12 % smaller.
            options = {"compress_level": 1}
        case "webp":
            # Method 2 takes 0.05 s, the default 4 takes 0.12 s, for files of the same size.
            options = {"quality": compression, "method": 2}
        case "jpeg":
            options = {"quality": compression}
        case _:
            raise ValueError(f"unknown image format '{image_format}': one of png, webp, jpeg")
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def encode_video(frames: Iterable[Frame], fps: int) -> bytes:
    """Encode frames of one size as H.264 in MP4, 4:2:0, with the index in front so that playback starts at once.

    4:2:0 samples colour in 2x2 blocks, so an odd width or height gains one column or row, a copy of the last.

    Colours are BT.709 and tagged as such; without tags, players guess from the height.
    """
    buffer = io.BytesIO()
    # To move the index in front, the muxer opens its own output a second time and reads back what it wrote.
    container = av.open(
        buffer,
        "w",
        format="mp4",
        options={"movflags": "+faststart"},
        io_open=lambda url, flags, options: io.BytesIO(buffer.getvalue()),
    )
    with container:
        # crf 18 is visually lossless. 81 frames of 1280x720 on 2 cores: veryfast 1.5 s, 2.8 MB; medium 3.3 s, 4.2 MB.
        stream = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "18", **_repeatable()})
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for index, frame in enumerate(frames):
            height, width, _ = frame.shape
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if index == 0:
                stream.height, stream.width = even.shape[:2]
            picture = av.VideoFrame.from_ndarray(even, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            picture.pts, picture.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@cache
def _repeatable() -> dict[str, str]:
    """Keep x264 (PyAV 18's libx264) from its AVX-512 code: it encodes the same frames to other bytes in 1 of 4 runs,
    which decode to colours up to 28 of 255 off. Its AVX2 code gave 1 result in 32 runs."""
    flags = Path("/proc/cpuinfo")
    return {"x264-params": "asm=avx2"} if flags.exists() and " avx512f " in flags.read_text() else {}


def encode_thumbnail(frame: Frame) -> bytes:
    """A WebP of at most `THUMBNAIL_EDGE` pixels a side."""
    picture = Image.fromarray(frame)
    picture.thumbnail((THUMBNAIL_EDGE, THUMBNAIL_EDGE))
    return encode_image(picture, "webp", 80)


def spritesheet_indices(num_frames: int) -> list[int]:
    """The frames that a video's spritesheet shows: at most `SPRITESHEET_FRAMES`, evenly spaced from first to last."""
    count = min(num_frames, SPRITESHEET_FRAMES)
    return [round(i * (num_frames - 1) / max(1, count - 1)) for i in range(count)]


def encode_spritesheet(frames: Sequence[Frame]) -> bytes:
    """A JPEG of the frames in reading order, in a grid close to square, each at most `SPRITE_EDGE` pixels a side."""
    sprites = [Image.fromarray(frame) for frame in frames]
    for sprite in sprites:
        sprite.thumbnail((SPRITE_EDGE, SPRITE_EDGE))
    width, height = sprites[0].size
    columns = math.ceil(math.sqrt(len(sprites)))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(sprites) / columns) * height))
    for index, sprite in enumerate(sprites):
        sheet.paste(sprite, (index % columns * width, index // columns * height))
    return encode_image(sheet, "jpeg", 85)
