"""What is encoded decodes to the same."""

from __future__ import annotations

import io
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.media.encode import (
    encode_image,
    encode_spritesheet,
    encode_thumbnail,
    encode_video,
    spritesheet_indices,
)


def gradient(width: int, height: int, shift: int = 0) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, np.full_like(x, shift % 256)], -1).astype(np.uint8)


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


def test_media_needs_no_torch() -> None:
    code = "import sys, pipelines.media.encode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
