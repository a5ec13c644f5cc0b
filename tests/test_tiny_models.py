"""Every tiny model loads from disk and does every task of its family, as a trained one would."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from configs.model_family import ModelFamily, families, family_in
from pipelines.job import Task
from tests import tiny_models
from tests.tasks import FRAMES, SIZE, generate

NAMES = [name for name in tiny_models.BUILDERS if name != tiny_models.UNKNOWN_FAMILY]
FAMILY = {family.name: family for family in families()}
TASKS = [(name, Task(task)) for name in NAMES for task in FAMILY[name].tasks]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny_models")


@pytest.fixture(scope="module")
def load(directory: Path):
    @cache
    def load(name: str) -> tuple[DiffusionPipeline, ModelFamily | None]:
        path = tiny_models.save(name, directory)
        return DiffusionPipeline.from_pretrained(path), family_in(path)

    return load


@pytest.fixture(scope="module")
def made(load):
    """What a model makes, once for all tests that ask for the same."""

    @cache
    def made(name: str, task: Task, **parameters: Any) -> np.ndarray:
        return generate(*load(name), task, **parameters)

    return made


@pytest.fixture(autouse=True)
def small_reference_images() -> Iterator[None]:
    with tiny_models.small_reference_images():
        yield


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_a_task_gives_a_picture_or_clip_that_follows_seed_and_prompt(load, made, name: str, task: Task) -> None:
    frames = made(name, task)
    assert frames.shape == (FRAMES if task.is_video else 1, SIZE, SIZE, 3)
    assert np.isfinite(frames).all()
    assert frames.std() > 0.05
    np.testing.assert_array_equal(frames, generate(*load(name), task))
    assert np.abs(frames - made(name, task, seed=2)).mean() > 0.01
    assert np.abs(frames - made(name, task, prompt="рояль 🎹 на сцене")).max() > 1 / 255


@pytest.mark.parametrize(("name", "task"), [(n, t) for n, t in TASKS if not t.value.startswith("text_to")])
def test_what_is_made_of_an_image_depends_on_it(made, name: str, task: Task) -> None:
    # With 4 steps, unlike with 2, every default strength but 1 skips the first, which starts from noise alone.
    red, blue = (made(name, task, colors=(color,), num_inference_steps=4) for color in ("crimson", "navy"))
    assert np.abs(red - blue).max() > 1 / 255


@pytest.mark.parametrize(("name", "task"), [(n, t) for n, t in TASKS if t is Task.INPAINT])
def test_inpainting_changes_what_is_white_in_the_mask_and_keeps_the_rest(made, name: str, task: Task) -> None:
    """Compares the outermost columns: next to the mask's edge, the VAE sees both sides."""
    one, other = made(name, task), made(name, task, seed=2)
    freed, kept = (np.abs(one - other)[:, :, columns].mean() for columns in (slice(0, 8), slice(-8, None)))
    assert kept < freed / 2


@pytest.mark.parametrize(
    ("name", "task"),
    [(n, t) for n, t in TASKS if t in (Task.IMAGE_EDIT, Task.INPAINT) and FAMILY[n].max_images > 1],
)
def test_an_edit_takes_as_many_images_as_its_family_says(made, name: str, task: Task) -> None:
    colors = ("crimson", "navy", "gold", "teal", "plum", "peru")[: FAMILY[name].max_images]
    one, all_of_them = made(name, task), made(name, task, colors=colors)
    assert all_of_them.shape == one.shape
    assert np.abs(one - all_of_them).max() > 1 / 255


def test_a_model_of_no_known_family_loads_and_generates(load) -> None:
    pipeline, family = load(tiny_models.UNKNOWN_FAMILY)
    assert family is None
    picture = pipeline("a cat", width=SIZE, height=SIZE, num_inference_steps=2, output_type="np").images
    assert picture.shape == (1, SIZE, SIZE, 3)
    assert picture.std() > 0.05


@pytest.mark.parametrize("name", tiny_models.BUILDERS)
def test_the_weights_are_the_same_every_time_and_on_disk(load, name: str) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    built = tiny_models.build(name)
    assert torch.equal(torch.get_rng_state(), before), "the global generator moved"
    loaded, _ = load(name)
    for component, module in built.components.items():
        if isinstance(module, torch.nn.Module):
            state = getattr(loaded, component).state_dict()
            for key, tensor in module.state_dict().items():
                torch.testing.assert_close(state[key], tensor, rtol=0, atol=0)


def fill(directory: Path) -> None:
    (directory / "first").write_text("a")
    (directory / "second").write_text("b")


def make(directory: Path) -> list[str]:
    return sorted(file.name for file in tiny_models.make_directory_once(directory, fill).iterdir())


def test_processes_that_race_to_save_one_all_get_it_whole(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        for attempt in range(50):
            made = list(pool.map(make, [tmp_path / str(attempt)] * 4))
            assert made == [["first", "second"]] * 4
    assert sorted(int(entry.name) for entry in tmp_path.iterdir()) == list(range(50)), "private directories stay behind"


def test_one_that_cannot_be_saved_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        fill(directory)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        tiny_models.make_directory_once(tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []
