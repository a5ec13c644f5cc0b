"""Scenes as pixels."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.bundled.scenes.backgrounds import draw_background
from pipelines.bundled.scenes.scene import Motion, Placement, Scene
from pipelines.bundled.scenes.sprites import sprite


def render(scene: Scene, width: int, height: int, num_frames: int = 1) -> npt.NDArray[np.uint8]:
    """`(T, H, W, 3)` in sRGB, the same for the same scene. The motion takes the whole video, however long it is.

    Raises:
        FontMissing: the font is not installed.
    """
    background = draw_background(scene.background, width, height, Random(scene.seed))
    placements = scene.placements()
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for index in range(num_frames):
        frame = background.copy()
        for placement in placements:
            motion = scene.motion if placement.moves else "still"
            _paste(frame, placement, motion, index / max(num_frames - 1, 1))
        frames[index] = np.asarray(frame)
    return frames


def _paste(frame: Image.Image, placement: Placement, motion: Motion, progress: float) -> None:
    """Draw a sprite at `progress`, 0 to 1, of its motion."""
    x, y, size, angle = placement.x, placement.y, placement.size, 0.0
    match motion:
        case "moves left":
            x += 0.22 - 0.44 * progress
        case "moves right":
            x -= 0.22 - 0.44 * progress
        case "moves up":
            y += 0.18 - 0.36 * progress
        case "moves down":
            y -= 0.18 - 0.36 * progress
        case "bounces":
            y -= 0.15 * abs(math.sin(2 * math.pi * progress))
        case "spins":
            angle = 360 * progress
        case "grows":
            size *= 0.6 + 0.7 * progress
    image = sprite(placement.noun.emoji)
    if angle:
        image = image.rotate(angle, Image.Resampling.BICUBIC)
    side = max(4, round(size * min(frame.size)))
    image = image.resize((side, side), Image.Resampling.LANCZOS)
    frame.paste(image, (round(x * frame.width - side / 2), round(y * frame.height - side / 2)), image)
