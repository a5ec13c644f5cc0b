"""Texts are encoded once and cached, which does not show in the pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

from pipelines.generation.generation import generate
from pipelines.job import Result, Task
from pipelines.model.encodings import EncodingMemory
from pipelines.model.load import Model
from tests.pipelines.conftest import make_job

Load = Callable[[str], Model]


def output(model: Model, task: Task, prompt: str, **changes: Any) -> bytes:
    job, media = make_job(model, task, prompt=prompt, **changes)
    result = list(generate(model, job, media))[-1]
    assert isinstance(result, Result)
    return result.outputs[0].data


@contextmanager
def counted_encoders(model: Model) -> Iterator[Callable[[], int]]:
    """Count how often the model's text encoders run."""
    counts: list[mock.MagicMock] = []
    with ExitStack() as stack:
        for name, module in model.pipeline.components.items():
            if name.startswith("text_encoder") and module is not None:
                counts.append(stack.enter_context(mock.patch.object(module, "forward", side_effect=module.forward)))
        yield lambda: sum(each.call_count for each in counts)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("wan2.1-t2v", Task.TEXT_TO_VIDEO),
        ("wan2.2-ti2v", Task.IMAGE_TO_VIDEO),
        ("flux1", Task.IMAGE_EDIT),
        ("flux2-klein", Task.TEXT_TO_IMAGE),
        ("qwen-image", Task.TEXT_TO_IMAGE),
        ("sd3", Task.TEXT_TO_IMAGE),
        ("z-image", Task.TEXT_TO_IMAGE),
        ("stable-diffusion", Task.TEXT_TO_IMAGE),
    ],
)
def test_a_text_is_encoded_once_for_all_jobs(tiny_model: Load, name: str, task: Task) -> None:
    model = tiny_model(name)
    with counted_encoders(model) as count:
        first = output(model, task, "a text of its own")
        assert (encoded := count()) > 0
        assert output(model, task, "a text of its own", seeds=(2,)) != first
        assert output(model, task, "a text of its own") == first
        assert count() == encoded


def test_what_is_remembered_is_what_would_be_encoded(tiny_model: Load) -> None:
    model = tiny_model("wan2.1-t2v")
    remembered = [output(model, Task.TEXT_TO_IMAGE, "a remembered text") for _ in range(2)]
    with mock.patch.object(EncodingMemory, "attach"):
        assert [output(model, Task.TEXT_TO_IMAGE, "a remembered text")] * 2 == remembered


def test_the_negative_prompt_of_a_new_prompt_is_remembered(tiny_model: Load) -> None:
    model = tiny_model("wan2.1-t2v")
    output(model, Task.TEXT_TO_IMAGE, "an apple", negative_prompt="dull")
    with counted_encoders(model) as count:
        output(model, Task.TEXT_TO_IMAGE, "an egg", negative_prompt="dull")
        assert count() == 1


def test_a_text_with_a_picture_is_encoded_each_time(tiny_model: Load) -> None:
    model = tiny_model("qwen-image-edit")
    with counted_encoders(model) as count:
        first = output(model, Task.IMAGE_EDIT, "a blue cat")
        encoded = count()
        assert output(model, Task.IMAGE_EDIT, "a blue cat") == first
        assert count() == 2 * encoded


class Encoder:
    """A pipeline that encodes a text as a tensor of its length, 4 bytes per letter."""

    def __init__(self) -> None:
        self.encoded: list[str | list[str]] = []

    def encode_prompt(self, prompt: str | list[str], image: object = None, device: torch.device | None = None) -> Any:
        self.encoded.append(prompt)
        return torch.ones(1, len(prompt)), None, [torch.zeros(0)]


def test_the_oldest_are_forgotten_when_there_is_no_room() -> None:
    memory = EncodingMemory(max_bytes=44)
    pipeline = Encoder()
    memory.attach(pipeline)
    for prompt in ("four", "seven..", "four", "three"):
        encoding, nothing, [empty] = pipeline.encode_prompt(prompt, device=torch.device("cpu"))
        assert encoding.shape == (1, len(prompt))
        assert (nothing, empty.shape) == (None, (0,))
    assert memory.num_bytes == 4 * (4 + 5), "the one of seven letters was used longest ago"
    assert pipeline.encoded == ["four", "seven..", "three"]


def test_what_is_too_long_to_be_kept_drives_nothing_out() -> None:
    memory = EncodingMemory(max_bytes=44)
    pipeline = Encoder()
    memory.attach(pipeline)
    for prompt in ("four", "much too long to be kept", "four"):
        assert pipeline.encode_prompt(prompt)[0].shape == (1, len(prompt))
    assert pipeline.encoded == ["four", "much too long to be kept"]


def test_a_pipeline_may_change_what_it_is_given() -> None:
    memory = EncodingMemory()
    pipeline = Encoder()
    memory.attach(pipeline)
    pipeline.encode_prompt(["a", "b"])[0].zero_()
    assert (pipeline.encode_prompt(["a", "b"])[0] == 1).all()
    assert len(pipeline.encoded) == 1


def test_what_is_not_text_is_never_a_key() -> None:
    memory = EncodingMemory()
    pipeline = Encoder()
    memory.attach(pipeline)
    for image in (Image.new("RGB", (2, 2)), [Image.new("RGB", (2, 2))], torch.ones(2)):
        for _ in range(2):
            pipeline.encode_prompt("a cat", image=image)
    assert len(pipeline.encoded) == 6
    assert memory.num_bytes == 0


def test_options_tell_encodings_apart() -> None:
    memory = EncodingMemory()
    pipeline = Encoder()
    memory.attach(pipeline)
    for prompt, image in (("1", None), (["1"], None), ("1", 1), ("1", True), ("1", 1.0)):
        pipeline.encode_prompt(prompt, image=image)
    assert len(pipeline.encoded) == 5
