"""The bundled model: built once, whole, by whoever comes first; then only read."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from configs.model_family import family_in
from pipelines.bundled import make_directory_once, model_directory
from pipelines.job import Task


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ditserve"


def fill(directory: Path) -> None:
    (directory / "first").write_text("a")
    (directory / "second").write_text("b")


def make(directory: Path) -> list[str]:
    return sorted(file.name for file in make_directory_once(directory, fill).iterdir())


def test_processes_that_race_all_get_one_whole_directory(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        for attempt in range(50):
            made = list(pool.map(make, [tmp_path / str(attempt)] * 4))
            assert made == [["first", "second"]] * 4
    assert sorted(int(entry.name) for entry in tmp_path.iterdir()) == list(range(50)), "private directories stay behind"


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        fill(directory)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_directory_once(tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []


def test_it_is_built_on_first_use_and_only_read_after(cache: Path) -> None:
    directory = model_directory()
    assert directory.parent == cache
    built = {file: file.stat().st_mtime_ns for file in directory.rglob("*")}
    assert model_directory() == directory
    assert {file: file.stat().st_mtime_ns for file in directory.rglob("*")} == built

    code = "import sys; from pipelines.bundled import model_directory; print(model_directory(), 'torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == [str(directory), "False"]


def test_it_makes_pictures_and_clips_edits_and_animates_at_small_sizes(cache: Path) -> None:
    from diffusers import WanPipeline

    from tests.tasks import SIZE, generate

    directory = model_directory()
    family = family_in(directory)
    assert family is not None
    assert family.name == "wan2.2-ti2v"
    assert family.defaults_for("text_to_image").width == family.defaults_for("text_to_video").width == 256
    assert set(family.tasks) == {*Task} - {Task.INPAINT}

    pipeline = WanPipeline.from_pretrained(directory)
    for task in map(Task, family.tasks):
        frames = generate(pipeline, family, task)
        assert frames.shape[1:] == (SIZE, SIZE, 3)
        assert frames.std() > 0.05
