"""`ditserve generate`: one request in this process, without Ray."""

import io
from pathlib import Path

import av
import pytest
from PIL import Image

from deployments.command.cli import main

QUICK = ["--prompt", "a cat", "--size", "64x48", "--num-inference-steps", "2", "--seed", "3"]


def generate(output_path: Path, *flags: str) -> int:
    return main(["generate", "--output-path", str(output_path), *QUICK, *flags])


def test_the_suffix_says_that_a_picture_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path / "cat.webp") == 0
    picture = Image.open(tmp_path / "cat.webp")
    assert (picture.format, picture.size) == ("WEBP", (64, 48))
    written, progress = capsys.readouterr()
    assert written.split() == [str(tmp_path / "cat.webp")]
    assert "2/2" in progress


def test_the_suffix_says_that_a_clip_is_wanted(tmp_path: Path) -> None:
    assert generate(tmp_path / "cat.mp4", "--num-frames", "5", "--fps", "8") == 0
    with av.open(tmp_path / "cat.mp4") as clip:
        stream = clip.streams.video[0]
        assert (stream.frames, stream.average_rate, stream.width, stream.height) == (5, 8, 64, 48)


def test_a_folder_gets_a_clip_of_a_model_that_makes_clips(tmp_path: Path) -> None:
    assert generate(tmp_path / "new folder", "--num-frames", "5") == 0
    assert [path.suffix for path in (tmp_path / "new folder").iterdir()] == [".mp4"]


def test_several_outputs_are_numbered_and_follow_their_seeds(tmp_path: Path) -> None:
    assert generate(tmp_path / "cat.png", "--n", "2") == 0
    assert generate(tmp_path / "second.png", "--seed", "4") == 0
    first, second = (tmp_path / f"cat-{index}.png" for index in range(2))
    assert second.read_bytes() == (tmp_path / "second.png").read_bytes()
    assert first.read_bytes() != second.read_bytes()


def test_an_input_image_is_edited(tmp_path: Path) -> None:
    source = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(source, "PNG")
    (tmp_path / "red.png").write_bytes(source.getvalue())
    assert generate(tmp_path / "edit.png", "--image-path", str(tmp_path / "red.png"), "--strength", "0.9") == 0
    assert Image.open(tmp_path / "edit.png").size == (64, 48)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--num-inference-steps", "many"], "Invalid 'num_inference_steps'"),
        (["--true-cfg-scale", "4"], "does not read it"),
        (["--model-path", "/nowhere"], "There is no folder '/nowhere'"),
        (["--lora-path", "/nowhere"], "does not exist"),
        (["--image-path", "/nowhere"], "No such file"),
        (["--fps", "8", "--seconds", "2"], "An image has no seconds and no fps"),
    ],
)
def test_what_cannot_be_done_ends_with_its_reason(
    tmp_path: Path, flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tmp_path / "cat.png", *flags) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "cat.png").exists()


@pytest.mark.parametrize(
    ("output_path", "flags"),
    [("cat.gif", []), ("cat.png", ["--size", "big"]), ("cat.mp4", ["--fps", "0"]), ("folder", ["--n", "11"])],
)
def test_a_wrong_call_is_refused_before_the_model_is_loaded(
    tmp_path: Path, output_path: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tmp_path / output_path, "--model-path", "/nowhere", *flags) == 1
    assert "/nowhere" not in capsys.readouterr().err


def test_an_unknown_suffix_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path / "cat.gif") == 1
    assert "ends in neither .mp4 nor .png, .webp, .jpg, .jpeg" in capsys.readouterr().err
