"""The backgrounds of scenes: twelve plain colours, and nine places drawn in a few strokes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (220, 50, 47),
    "orange": (240, 145, 40),
    "yellow": (250, 220, 80),
    "green": (80, 175, 80),
    "blue": (65, 125, 225),
    "purple": (145, 85, 190),
    "pink": (250, 165, 200),
    "white": (250, 250, 250),
    "black": (20, 20, 24),
    "gray": (150, 150, 150),
    "brown": (135, 95, 65),
    "cyan": (110, 215, 225),
}
"""In 8-bit sRGB."""


def draw_background(name: str, width: int, height: int, random: Random) -> Image.Image:
    """An RGB image of this size. `random` shifts colours and horizons a little.

    Raises:
        KeyError: there is no such background.
    """
    if name in COLOURS:
        colour = _near(COLOURS[name], random, 6)
        return Image.new("RGB", (width, height), colour)
    return _PLACES[name](width, height, random)


def _near(colour: Colour, random: Random, distance: int) -> Colour:
    red, green, blue = (min(255, max(0, value + random.randint(-distance, distance))) for value in colour)
    return red, green, blue


def _gradient(width: int, height: int, top: Colour, bottom: Colour) -> Image.Image:
    share = np.linspace(0, 1, height)[:, None, None]
    rows = np.array(top) * (1 - share) + np.array(bottom) * share
    return Image.fromarray(np.broadcast_to(rows, (height, width, 3)).astype(np.uint8))


def _landscape(sky: tuple[Colour, Colour], ground: tuple[Colour, Colour], horizon: tuple[float, float]) -> _Painter:
    """Sky above ground, each a gradient from its first colour to its second, meeting between the two heights."""

    def paint(width: int, height: int, random: Random) -> Image.Image:
        image = _gradient(width, height, *(_near(colour, random, 8) for colour in sky))
        line = round(height * random.uniform(*horizon))
        image.paste(_gradient(width, height - line, *ground), (0, line))
        return image

    return paint


def _stage(width: int, height: int, random: Random) -> Image.Image:
    """Boards in front of a dark red backdrop, between curtains and under a valance."""
    image = _gradient(width, height, (70, 10, 20), (110, 20, 30))
    floor = round(height * random.uniform(0.68, 0.78))
    image.paste((150, 100, 60), (0, floor, width, height))
    curtain = round(width * 0.13)
    image.paste((165, 20, 35), (0, 0, curtain, height))
    image.paste((165, 20, 35), (width - curtain, 0, width, height))
    image.paste((185, 30, 45), (0, 0, width, round(height * 0.09)))
    return image


def _beach(width: int, height: int, random: Random) -> Image.Image:
    image = _gradient(width, height, _near((110, 190, 240), random, 8), (190, 230, 250))
    water, sand = round(height * random.uniform(0.45, 0.55)), round(height * 0.7)
    image.paste((40, 130, 190), (0, water, width, sand))
    image.paste((240, 215, 150), (0, sand, width, height))
    return image


def _night_sky(width: int, height: int, random: Random) -> Image.Image:
    image = _gradient(width, height, (8, 8, 35), (30, 30, 80))
    draw = ImageDraw.Draw(image)
    unit = min(width, height) / 128
    for _ in range(round(25 * width * height / min(width, height) ** 2)):
        x, y, radius = random.random() * width, random.random() * height, unit * random.uniform(0.5, 1.1)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 230))
    return image


def _fade(top: Colour, bottom: Colour) -> _Painter:
    return lambda width, height, random: _gradient(width, height, _near(top, random, 8), _near(bottom, random, 8))


_Painter = Callable[[int, int, Random], Image.Image]

_PLACES: dict[str, _Painter] = {
    "stage": _stage,
    "beach": _beach,
    "night sky": _night_sky,
    "grass": _landscape(((130, 200, 245), (210, 238, 250)), ((110, 190, 80), (70, 150, 60)), (0.55, 0.65)),
    "snow": _landscape(((150, 185, 215), (210, 228, 240)), ((248, 250, 255), (235, 242, 252)), (0.55, 0.65)),
    "desert": _landscape(((250, 190, 110), (255, 230, 170)), ((225, 175, 100), (210, 155, 85)), (0.55, 0.65)),
    "room": _landscape(((235, 220, 195), (225, 208, 180)), ((160, 115, 75), (145, 100, 62)), (0.66, 0.74)),
    "underwater": _fade((60, 180, 220), (10, 60, 120)),
    "sunset": _fade((90, 50, 120), (255, 140, 70)),
}

PLACES = tuple(_PLACES)
BACKGROUNDS = (*COLOURS, *PLACES)
