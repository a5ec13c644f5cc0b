"""An upload is identified by its content; what is no image is refused before it costs anything."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines.job import InvalidJob
from pipelines.media.uploads import decode_image, decode_mask
from tests.pipelines.media.test_encode import gradient

MAX_PIXELS = 4096 * 4096


def saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_an_upload_is_known_by_its_content(image_format: str) -> None:
    image = decode_image(saved(Image.fromarray(gradient(20, 10)), image_format), max_pixels=MAX_PIXELS)
    assert image.mode == "RGB"
    assert image.size == (20, 10)


def test_transparency_is_kept() -> None:
    rgba = Image.new("RGBA", (4, 4), (10, 20, 30, 40))
    assert decode_image(saved(rgba, "PNG"), max_pixels=MAX_PIXELS).getpixel((0, 0)) == (10, 20, 30, 40)
    palette = rgba.quantize()
    assert decode_image(saved(palette, "PNG"), max_pixels=MAX_PIXELS).mode == "RGBA"


def test_sixteen_bit_greys_keep_their_brightness() -> None:
    grey = Image.fromarray(np.full((4, 4), 0x80FF, np.uint16))
    assert decode_image(saved(grey, "PNG"), max_pixels=MAX_PIXELS).getpixel((0, 0)) == (0x80, 0x80, 0x80)


def test_exif_orientation_is_honoured() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to see it upright
    data = saved(Image.fromarray(gradient(20, 10)), "JPEG", exif=exif)
    assert decode_image(data, max_pixels=MAX_PIXELS).size == (10, 20)


def png_header_claiming(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Not a PNG"),
        (b"GET / HTTP/1.1", "Not a PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "Not a PNG"),
        (saved(Image.new("RGB", (8, 8)), "BMP"), "Not a PNG"),
        (saved(Image.effect_noise((64, 64), 80), "PNG")[:1000], "damaged"),
        (saved(Image.fromarray(gradient(64, 64)), "JPEG")[:-100], "damaged"),
        (png_header_claiming(5000, 5000), "at most 16777216"),
        (png_header_claiming(60000, 60000), "decompression bomb"),
    ],
    ids=["empty", "text", "svg", "bmp", "cut png", "cut jpeg", "too large", "bomb"],
)
def test_what_is_no_acceptable_picture_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidJob, match=reason) as refusal:
        decode_image(data, max_pixels=MAX_PIXELS)
    assert refusal.value.param == "image"


def test_an_animation_is_refused_undecoded() -> None:
    frames = [Image.fromarray(gradient(8, 8, shift)) for shift in range(0, 90, 30)]
    for image_format in ("PNG", "WEBP"):
        data = saved(frames[0], image_format, save_all=True, append_images=frames[1:])
        with pytest.raises(InvalidJob, match="Animated"):
            decode_image(data, max_pixels=MAX_PIXELS)


def test_transparent_pixels_of_a_mask_are_edited() -> None:
    mask = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    mask.putpixel((1, 0), (0, 0, 0, 0))
    decoded = decode_mask(saved(mask, "PNG"), size=(4, 2), max_pixels=MAX_PIXELS)
    assert decoded.mode == "L"
    assert np.argwhere(np.asarray(decoded) == 255).tolist() == [[0, 1]]
    assert (np.asarray(decoded) == 0).sum() == 7


@pytest.mark.parametrize(
    ("mask", "reason"),
    [(Image.new("RGB", (4, 2)), "alpha"), (Image.new("RGBA", (2, 2)), "4x2")],
    ids=["opaque", "other size"],
)
def test_a_mask_that_says_nothing_is_refused(mask: Image.Image, reason: str) -> None:
    with pytest.raises(InvalidJob, match=reason) as refusal:
        decode_mask(saved(mask, "PNG"), size=(4, 2), max_pixels=MAX_PIXELS)
    assert refusal.value.param == "mask"


def test_uploads_need_neither_torch_nor_a_video_encoder() -> None:
    code = "import sys, pipelines.media.uploads; sys.exit(bool({'torch', 'av'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
