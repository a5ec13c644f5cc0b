"""`Storage`: files by key, whole or absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deployments.state.storage import Storage


@pytest.fixture(params=["folder", "file URL", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return {
        "folder": lambda: Storage(str(tmp_path / "not" / "yet" / "there")),
        "file URL": lambda: Storage(f"file://{tmp_path}"),
        "memory": lambda: Storage(f"memory://{uuid.uuid4()}"),
    }[request.param]()


def test_a_file_is_read_whole_and_in_ranges(storage: Storage):
    storage.put("videos/video_1-0.mp4", bytes(range(100)))
    assert storage.size("videos/video_1-0.mp4") == 100
    assert storage.read("videos/video_1-0.mp4") == bytes(range(100))
    assert storage.read("videos/video_1-0.mp4", 10, 5) == bytes(range(10, 15))
    assert storage.read("videos/video_1-0.mp4", 90, 50) == bytes(range(90, 100))
    assert storage.read("videos/video_1-0.mp4", 100, 5) == b""


def test_an_empty_file_is_a_file(storage: Storage):
    storage.put("empty", b"")
    assert (storage.size("empty"), storage.read("empty")) == (0, b"")


def test_a_second_put_replaces_the_first(storage: Storage):
    storage.put("a", b"long before")
    storage.put("a", b"after")
    assert storage.read("a") == b"after"


def test_a_deleted_file_is_gone_and_others_stay(storage: Storage):
    storage.put("a/b", b"1")
    storage.put("a/c", b"2")
    storage.delete("a/b")
    storage.delete("a/b")
    for call in (storage.read, storage.size):
        with pytest.raises(FileNotFoundError):
            call("a/b")
    assert storage.read("a/c") == b"2"


TRAVERSALS = ["..", "../a", "a/../../b", "a/..", "/etc/passwd", "a\\..\\b", "~/a", "file:///a", ".a.partial"]
MALFORMED = ["", ".", "a//b", "a/", "a\n", "a\0b", "ä"]


@pytest.mark.parametrize("key", TRAVERSALS + MALFORMED)
@pytest.mark.parametrize("method", [Storage.put, Storage.read, Storage.size, Storage.delete])
def test_a_key_cannot_name_anything_outside(storage: Storage, tmp_path: Path, key: str, method: Callable):
    with pytest.raises(ValueError, match="not a storage key"):
        method(storage, key, *[b"data"] * (method is Storage.put))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_put_leaves_nothing_but_the_file(tmp_path: Path):
    Storage(str(tmp_path)).put("a/b", b"x")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == ["a/b"]


SIZE = 20_000_000
WRITER = """
import sys
from deployments.state.storage import Storage
storage = Storage(sys.argv[1])
print("ready", flush=True)
while True:
    for letter in (b"a", b"b"):
        storage.put("videos/clip.mp4", letter * int(sys.argv[2]))
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process that replaces the same file again and again, with different content each time."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(SIZE)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_process_killed_in_the_middle_of_put_leaves_no_half_file(writer: subprocess.Popen, tmp_path: Path):
    storage, file = Storage(str(tmp_path)), tmp_path / "videos" / "clip.mp4"
    while not file.exists():
        time.sleep(0.005)
    for _ in range(1000):
        os.kill(writer.pid, signal.SIGSTOP)
        os.waitpid(writer.pid, os.WUNTRACED)
        assert storage.read("videos/clip.mp4") in (b"a" * SIZE, b"b" * SIZE)
        if len(list(file.parent.iterdir())) == 2:
            break  # it is writing beside the file
        os.kill(writer.pid, signal.SIGCONT)
        time.sleep(0.003)
    else:
        pytest.fail("never met in the middle of a put")
    writer.kill()
    writer.wait()

    assert storage.read("videos/clip.mp4") in (b"a" * SIZE, b"b" * SIZE)
    assert len(list(file.parent.iterdir())) == 2
    storage.delete("videos/clip.mp4")
    assert list(file.parent.iterdir()) == []
