"""What a pipeline computed becomes the frames and size that were asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.job import Job, Task
from pipelines.media.canvas import Canvas
from pipelines.media.outputs import asked_frames


def job(width: int, height: int, task: Task = Task.INPAINT, num_frames: int = 1) -> Job:
    return Job(
        id="job",
        task=task,
        prompt="",
        width=width,
        height=height,
        num_frames=num_frames,
        num_inference_steps=1,
        seeds=(1,),
    )


def slope(width: int, height: int) -> torch.Tensor:
    """An image whose red is how far right a pixel's centre is, and whose green is how far down, from 0 to 1."""
    red = ((torch.arange(width) + 0.5) / width).expand(height, width)
    green = ((torch.arange(height) + 0.5) / height)[:, None].expand(height, width)
    return torch.stack([red, green, torch.zeros(height, width)])[None]


def test_what_is_computed_beyond_the_asked_size_and_length_is_cut_off() -> None:
    pixels = torch.rand(1, 5, 3, 64, 64)
    clip = asked_frames(pixels, job(60, 50, Task.TEXT_TO_VIDEO, num_frames=4), Canvas(64, 64, 5))
    assert torch.equal(clip, pixels[0, :4, :, :50, :60])


@pytest.mark.parametrize("computed", [(128, 32), (40, 96), (16, 16)], ids=str)
def test_another_size_than_the_canvas_is_scaled_to_it_as_a_whole(computed: tuple[int, int]) -> None:
    [picture] = asked_frames(slope(*computed), job(60, 50), Canvas(64, 64, 1))
    # Compared a few pixels away from the border, beyond which there is nothing to blend with.
    np.testing.assert_allclose(picture[:, 8:, 8:], slope(64, 64)[0, :, 8:50, 8:60], atol=1e-2)


def test_lines_too_fine_for_the_asked_size_blend() -> None:
    stripes = torch.tensor([0.0, 1.0]).repeat(128).expand(1, 3, 64, 256)
    [picture] = asked_frames(stripes, job(64, 64), Canvas(64, 64, 1))
    np.testing.assert_allclose(picture[:, :, 8:-8], 0.5, atol=0.02)


def test_a_scaled_picture_has_no_values_that_a_byte_has_not() -> None:
    edge = torch.tensor([0.0, 1.0]).repeat_interleave(16).expand(1, 3, 32, 32)
    [picture] = asked_frames(edge, job(64, 64), Canvas(64, 64, 1))
    assert (picture.min(), picture.max()) == (0, 1)
