"""Pictures and clips to bytes and back. Pillow, NumPy and PyAV only, so that any process may decode an upload.

A frame is a uint8 array of shape `(H, W, 3)`, RGB. Clips are encoded frame by frame: no clip is ever held as a list.
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
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.job import InvalidJob

Frame = NDArray[np.uint8]

INPUT_FORMATS = ("PNG", "JPEG", "WEBP")
"""What clients may upload, by Pillow's names. Everything else stays unopened."""

THUMBNAIL_EDGE = 320
SPRITE_EDGE = 160
SPRITESHEET_FRAMES = 16


def encode_image(image: Image.Image | Frame, image_format: str, compression: int = 100) -> bytes:
    """Encode one picture as `png`, `webp` or `jpeg`.

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
            # Method 2 takes 0.05 s where the default 4 takes 0.12 s, for files of one size.
            options = {"quality": compression, "method": 2}
        case "jpeg":
            options = {"quality": compression}
        case _:
            raise ValueError(f"unknown picture format '{image_format}': one of png, webp, jpeg")
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def encode_video(frames: Iterable[Frame], fps: int) -> bytes:
    """Encode frames of one size as H.264 in MP4, 4:2:0, with the index in front so that playing starts at once.

    4:2:0 samples colour in 2x2 blocks: an odd width or height gains one column or row, a copy of the last.

    Colours are BT.709 and tagged so; untagged, players guess from the height.
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
    """Keep x264 (libx264 of PyAV 18) from its AVX-512 code, with which the same frames give other bytes in 1 of 4 runs,
    and decode to colours up to 28 of 255 away. With AVX2's: 1 result in 32 runs."""
    flags = Path("/proc/cpuinfo")
    return {"x264-params": "asm=avx2"} if flags.exists() and " avx512f " in flags.read_text() else {}


def encode_thumbnail(frame: Frame) -> bytes:
    """A WebP of at most `THUMBNAIL_EDGE` pixels a side."""
    picture = Image.fromarray(frame)
    picture.thumbnail((THUMBNAIL_EDGE, THUMBNAIL_EDGE))
    return encode_image(picture, "webp", 80)


def spritesheet_indices(num_frames: int) -> list[int]:
    """Which frames of a clip its spritesheet shows: at most `SPRITESHEET_FRAMES`, evenly spaced, first and last in."""
    count = min(num_frames, SPRITESHEET_FRAMES)
    return [round(i * (num_frames - 1) / max(1, count - 1)) for i in range(count)]


def encode_spritesheet(frames: Sequence[Frame]) -> bytes:
    """A JPEG of the frames in reading order in a grid as square as they allow, at most `SPRITE_EDGE` pixels each."""
    sprites = [Image.fromarray(frame) for frame in frames]
    for sprite in sprites:
        sprite.thumbnail((SPRITE_EDGE, SPRITE_EDGE))
    width, height = sprites[0].size
    columns = math.ceil(math.sqrt(len(sprites)))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(sprites) / columns) * height))
    for index, sprite in enumerate(sprites):
        sheet.paste(sprite, (index % columns * width, index // columns * height))
    return encode_image(sheet, "jpeg", 85)


def decode_image(data: bytes, *, max_pixels: int, param: str = "image") -> Image.Image:
    """Decode an uploaded PNG, JPEG or WebP, judged by its content alone, upright as its EXIF orientation says.

    Returns:
        An RGBA picture when it has transparency, else RGB.

    Raises:
        InvalidJob: not such a picture, truncated, animated, or of more than `max_pixels` pixels; the last two before
            any pixel is decoded. Its `param` is the one given.
    """
    try:
        with Image.open(io.BytesIO(data), formats=INPUT_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise InvalidJob(f"The picture has {width}x{height} pixels; at most {max_pixels} are accepted", param)
            if getattr(image, "n_frames", 1) > 1:
                raise InvalidJob("Animated pictures are not accepted: send a single frame", param)
            image.load()
            upright = ImageOps.exif_transpose(image)
    except InvalidJob:
        raise
    except UnidentifiedImageError as error:
        raise InvalidJob("Not a PNG, JPEG or WebP picture", param) from error
    # Pillow's decoders report a damaged file as OSError, SyntaxError, ValueError, struct.error and others.
    except Exception as error:
        raise InvalidJob(f"The picture is damaged: {error}", param) from error
    if upright.mode == "I;16":
        return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")
    return upright.convert("RGBA" if upright.has_transparency_data else "RGB")


def decode_mask(data: bytes, *, size: tuple[int, int], max_pixels: int) -> Image.Image:
    """Decode a mask whose transparent pixels are to be edited.

    Args:
        size: `(width, height)` of the picture it belongs to.

    Returns:
        A greyscale picture with the sense of diffusers: white is edited, black is kept.

    Raises:
        InvalidJob: not a picture, without transparency, or of another size.
    """
    mask = decode_image(data, max_pixels=max_pixels, param="mask")
    if mask.mode != "RGBA":
        raise InvalidJob("The mask has no alpha channel: its transparent pixels say what to edit", "mask")
    if mask.size != size:
        raise InvalidJob(
            f"The mask has {mask.width}x{mask.height} pixels, the picture {size[0]}x{size[1]}: they must agree", "mask"
        )
    return ImageOps.invert(mask.getchannel("A"))
