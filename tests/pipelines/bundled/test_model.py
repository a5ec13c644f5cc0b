"""The bundled model: small, complete, served like any other of its family, and it draws what it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from benchmarks.bundled_score import nearest_colour
from configs.model_family import family_in
from configs.server_args import ServerArgs
from deployments.command.generate import load
from pipelines.bundled.scenes.backgrounds import COLOURS
from pipelines.generation.generation import generate as run
from pipelines.job import Job, Result, Task
from pipelines.model.bundled import model_directory
from tests.e2e.pictures import pixels
from tests.tasks import SIZE, generate

SEPIA = Path(model_directory().parent, "lora", "sepia.safetensors")

LARGEST = 40e6
"""Bytes of all files: the model ships with the package."""


def test_it_is_small_and_without_pickles() -> None:
    files = [file for file in model_directory().rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".yaml"}
    assert sum(file.stat().st_size for file in files) < LARGEST


def test_it_is_found_without_torch() -> None:
    code = "import sys, pipelines.model.bundled as bundled; print(bundled.model_directory(), 'torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == [str(model_directory()), "False"]


def test_it_makes_pictures_and_clips_edits_and_animates_at_small_sizes() -> None:
    family = family_in(model_directory())
    assert family is not None
    assert family.name == "wan2.2-ti2v"
    assert family.defaults_for("text_to_image").width == 256
    assert family.defaults_for("text_to_video").width == 256
    assert set(family.tasks) == {*Task} - {Task.INPAINT}

    pipeline = WanPipeline.from_pretrained(model_directory(), dtype=torch.float32)
    for task in map(Task, family.tasks):
        frames = generate(pipeline, family, task)
        assert frames.shape[1:] == (SIZE, SIZE, 3)
        assert frames.std() > 0.05


def draw(prompt: str, args: ServerArgs) -> np.ndarray:
    """With the model's own defaults."""
    model = load(args)
    defaults = model.card.family.defaults_for(Task.TEXT_TO_IMAGE).model_dump()
    *_, result = run(model, Job(id="picture", task=Task.TEXT_TO_IMAGE, prompt=prompt, seeds=(1,), **defaults), {})
    assert isinstance(result, Result)
    return pixels(result.outputs[0].data)


@pytest.mark.parametrize(
    ("prompt", "background", "foreground"),
    [
        ("a red apple on a blue background", "blue", "red"),
        ("A big tree on a pink background", "pink", "green"),
        ("a photo of a cute sun on a black background", "black", "yellow"),
    ],
)
def test_it_draws_what_it_is_asked_for(prompt: str, background: str, foreground: str) -> None:
    picture = draw(prompt, ServerArgs(device="cpu", dtype="fp32"))
    assert nearest_colour(picture[:8].reshape(-1, 3)) == background
    height, width, _ = picture.shape
    middle = picture[height * 3 // 8 : height * 5 // 8, width * 3 // 8 : width * 5 // 8].reshape(-1, 3)
    subject = middle[np.abs(middle - COLOURS[background]).sum(1) > 60]
    assert len(subject) > len(middle) / 4
    assert nearest_colour(subject) in (foreground, "orange")


def test_the_adapter_beside_it_makes_it_draw_in_sepia() -> None:
    assert SEPIA.stat().st_size < 2e6
    prompt = "a fish on a blue background"
    plain = draw(prompt, ServerArgs(device="cpu", dtype="fp32"))
    sepia = draw(prompt, ServerArgs(device="cpu", dtype="fp32", lora_path=str(SEPIA)))
    (red, _, blue), (sepia_red, _, sepia_blue) = plain.mean((0, 1)), sepia.mean((0, 1))
    assert blue > red + 50
    assert sepia_red > sepia_blue
