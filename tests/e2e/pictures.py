"""Images to send, and decoders for what comes back."""

from __future__ import annotations

import io

import av
import numpy as np
from PIL import Image


def picture(size: tuple[int, int] = (64, 64), mode: str = "RGB", image_format: str = "PNG") -> bytes:
    """An image of one colour; with an alpha channel, fully transparent."""
    buffer = io.BytesIO()
    Image.new(mode, size, (200, 100, 50, 0)[: len(mode)]).save(buffer, image_format)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def pixels(data: bytes) -> np.ndarray:
    """An image as `(height, width, 3)` of 0 to 255."""
    return np.asarray(opened(data).convert("RGB"), np.int16)


def decoded_frames(data: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(data)) as container:
        return list(container.decode(video=0))
