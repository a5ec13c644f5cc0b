"""Images of nouns: the glyphs of the Noto Color Emoji font."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONTS = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),  # Debian, Ubuntu: fonts-noto-color-emoji
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),  # Arch: noto-fonts-emoji
    Path("/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf"),  # Fedora
)

STRIKE = 109
"""The only size, in pixels per em, of the font's bitmaps."""


class FontMissing(Exception):
    """The font that scenes are drawn from is not installed."""


def find_font() -> Path:
    """
    Raises:
        FontMissing: the font is in none of the places where distributions put it.
    """
    for path in FONTS:
        if path.is_file():
            return path
    raise FontMissing(
        "Noto Color Emoji is not installed: apt-get install fonts-noto-color-emoji, or put it at "
        + " or ".join(map(str, FONTS))
    )


@cache
def sprite(emoji: str) -> Image.Image:
    """The glyph on a transparent square, at the font's size (up to 136 pixels). Cached: do not write to it.

    Raises:
        FontMissing: the font is not installed.
        ValueError: the font has no such glyph.
    """
    canvas = Image.new("RGBA", (200, 180))
    ImageDraw.Draw(canvas).text((20, 20), emoji, font=_font(), embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"Noto Color Emoji draws nothing for {emoji!r}")
    glyph = canvas.crop(box)
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(find_font(), STRIKE)
