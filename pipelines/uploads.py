"""Uploaded bytes to pictures. Pillow and NumPy only: the ingress judges an upload before it asks a rank."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.job import InvalidJob

INPUT_FORMATS = ("PNG", "JPEG", "WEBP")
"""What clients may upload, by Pillow's names. Everything else stays unopened."""

MAX_INPUT_PIXELS = 8192 * 8192
"""More than most cameras' pictures have, and 256 MiB once decoded: what a small file may grow to."""


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
                raise InvalidJob(f"The image has {width}x{height} pixels; at most {max_pixels} are accepted", param)
            if getattr(image, "n_frames", 1) > 1:
                raise InvalidJob("Animated images are not accepted: send a single frame", param)
            image.load()
            upright = ImageOps.exif_transpose(image)
    except InvalidJob:
        raise
    except UnidentifiedImageError as error:
        raise InvalidJob("Not a PNG, JPEG or WebP image", param) from error
    # Pillow's decoders report a damaged file as OSError, SyntaxError, ValueError, struct.error and others.
    except Exception as error:
        raise InvalidJob(f"The image is damaged: {error}", param) from error
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
            f"The mask has {mask.width}x{mask.height} pixels, the image {size[0]}x{size[1]}: they must agree", "mask"
        )
    return ImageOps.invert(mask.getchannel("A"))
