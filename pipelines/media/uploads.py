"""From uploaded bytes to images. Pillow and NumPy only: the ingress checks an upload before any rank sees it."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.job import InvalidJob

INPUT_FORMATS = ("PNG", "JPEG", "WEBP")
"""The formats clients may upload, by Pillow's names. No others are opened."""

MAX_INPUT_PIXELS = 8192 * 8192
"""More than most cameras produce. Limits what a small file may decode to: 256 MiB."""


def decode_image(data: bytes, *, max_pixels: int, param: str = "image") -> Image.Image:
    """Decode an uploaded PNG, JPEG or WebP, recognised by its content alone, and apply its EXIF orientation.

    Returns:
        An RGBA image if it has transparency, else RGB.

    Raises:
        InvalidJob: not such an image, truncated, animated, or of more than `max_pixels` pixels. The last two are
            detected before any pixel is decoded. Its `param` is the one given.
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
        size: `(width, height)` of the image it belongs to.

    Returns:
        A greyscale image as diffusers expects it: white is edited, black is kept.

    Raises:
        InvalidJob: not an image, without transparency, or of another size.
    """
    mask = decode_image(data, max_pixels=max_pixels, param="mask")
    if mask.mode != "RGBA":
        raise InvalidJob("The mask has no alpha channel: its transparent pixels say what to edit", "mask")
    if mask.size != size:
        raise InvalidJob(
            f"The mask has {mask.width}x{mask.height} pixels, the image {size[0]}x{size[1]}: they must agree", "mask"
        )
    return ImageOps.invert(mask.getchannel("A"))
