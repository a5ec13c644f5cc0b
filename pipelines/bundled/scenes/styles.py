"""Looks that an adapter can learn: functions of the pixels of a scene."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]
"""`(T, H, W, 3)` in sRGB."""

PIXEL = 8
"""Side of a pixel-art pixel, a size that the autoencoder can draw."""


def sepia(frames: Frames) -> Frames:
    """The matrix of the W3C's Filter Effects, section 8.3 (`sepia(1)`)."""
    matrix = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])
    return (frames @ matrix.T).clip(0, 255).astype(np.uint8)


def pixel_art(frames: Frames) -> Frames:
    """Blocks of 8x8 pixels in 6 shades a channel. Width and height are multiples of 8."""
    length, height, width, _ = frames.shape
    blocks = frames.reshape(length, height // PIXEL, PIXEL, width // PIXEL, PIXEL, 3).mean((2, 4))
    shades = (blocks / 51).round() * 51
    return shades.repeat(PIXEL, 1).repeat(PIXEL, 2).astype(np.uint8)


STYLES: dict[str, Callable[[Frames], Frames]] = {"sepia": sepia, "pixel-art": pixel_art}
