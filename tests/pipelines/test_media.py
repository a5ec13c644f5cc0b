"""What is encoded decodes to the same; what is no picture is refused before it costs anything."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.job import InvalidJob
from pipelines.media import (
    decode_image,
    decode_mask,
    encode_image,
    encode_spritesheet,
    encode_thumbnail,
    encode_video,
    spritesheet_indices,
)

MAX_PIXELS = 4096 * 4096


def gradient(width: int, height: int, shift: int = 0) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, np.full_like(x, shift % 256)], -1).astype(np.uint8)


def saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_a_picture_comes_back_in_the_format_asked_for(image_format: str) -> None:
    frame = gradient(65, 33)
    decoded = Image.open(io.BytesIO(encode_image(frame, image_format, 95)))
    assert decoded.format == image_format.upper()
    assert decoded.size == (65, 33)
    difference = np.abs(np.asarray(decoded.convert("RGB"), np.int16) - frame)
    assert difference.mean() <= (0 if image_format == "png" else 3)


@pytest.mark.parametrize("image_format", ["webp", "jpeg"])
def test_less_quality_makes_smaller_files(image_format: str) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert len(encode_image(frame, image_format, 20)) < len(encode_image(frame, image_format, 90))


def test_an_unknown_format_is_an_error() -> None:
    with pytest.raises(ValueError, match="tiff"):
        encode_image(gradient(8, 8), "tiff")


@pytest.mark.parametrize(("width", "height"), [(64, 48), (65, 48), (64, 49), (33, 17)])
@pytest.mark.parametrize(("num_frames", "fps"), [(1, 16), (9, 16), (17, 24)])
def test_a_clip_has_the_codec_rate_and_frames_asked_for(width: int, height: int, num_frames: int, fps: int) -> None:
    frames = [gradient(width, height, shift=8 * i) for i in range(num_frames)]
    data = encode_video(iter(frames), fps)

    assert 0 < data.find(b"moov") < data.find(b"mdat")
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == fps
        assert stream.frames == num_frames
        decoded = [picture.to_ndarray(format="rgb24") for picture in container.decode(stream)]
    assert len(decoded) == num_frames
    assert decoded[0].shape == (height + height % 2, width + width % 2, 3)
    for original, picture in zip(frames, decoded, strict=True):
        assert np.abs(picture[:height, :width].astype(np.int16) - original).mean() < 6


def test_colours_survive_the_way_through_bt709() -> None:
    red = np.full((64, 64, 3), (220, 30, 30), np.uint8)
    with av.open(io.BytesIO(encode_video([red], 16))) as container:
        picture = next(container.decode(video=0))
        assert picture.colorspace == av.video.reformatter.Colorspace.ITU709
        decoded = picture.to_ndarray(format="rgb24")
    assert np.abs(decoded.astype(np.int16) - red).max() <= 4


def test_frames_are_taken_one_by_one() -> None:
    alive = []

    def frames():
        for shift in range(40):
            frame = gradient(64, 48, shift)
            alive.append(sys.getrefcount(frame))
            yield frame

    assert encode_video(frames(), 16)
    assert len(alive) == 40


def test_a_thumbnail_is_a_small_webp_of_the_frame() -> None:
    thumbnail = Image.open(io.BytesIO(encode_thumbnail(gradient(640, 320))))
    assert thumbnail.format == "WEBP"
    assert thumbnail.size == (320, 160)


@pytest.mark.parametrize(("num_frames", "grid"), [(1, (1, 1)), (5, (3, 2)), (16, (4, 4)), (81, (4, 4))])
def test_a_spritesheet_shows_frames_from_first_to_last_in_a_grid(num_frames: int, grid: tuple[int, int]) -> None:
    indices = spritesheet_indices(num_frames)
    assert indices[0] == 0
    assert indices[-1] == num_frames - 1
    assert len(set(indices)) == len(indices) == min(num_frames, 16)
    sheet = Image.open(io.BytesIO(encode_spritesheet([gradient(320, 160, i) for i in indices])))
    assert sheet.format == "JPEG"
    assert sheet.size == (grid[0] * 160, grid[1] * 80)


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


def test_media_needs_no_torch() -> None:
    code = "import sys, pipelines.media; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
