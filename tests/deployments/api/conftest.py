"""One server per kind of model. The tests know it by its URL alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from PIL import Image

from pipelines.job import Task
from tests.deployments.api.stand_in import model_card, stand_in_server
from tests.e2e.server import free_port

IMAGES = model_card(
    "images",
    [Task.TEXT_TO_IMAGE, Task.IMAGE_EDIT, Task.INPAINT],
    ["negative_prompt", "true_cfg_scale", "strength"],
    width=64,
    height=64,
)
VIDEOS = model_card(
    "videos", [Task.TEXT_TO_VIDEO], ["negative_prompt", "guidance_scale"], width=64, height=32, num_frames=9, fps=8
)
ANIMATION = model_card(
    "animation", [Task.IMAGE_TO_VIDEO], ["negative_prompt", "guidance_scale"], width=64, height=32, num_frames=9, fps=8
)


@dataclass(frozen=True)
class Server:
    base_url: str
    """Without the `/v1`."""

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.base_url, timeout=60)

    def openai(self, *, strict: bool = True) -> OpenAI:
        """OpenAI's client; a strict one raises for every answer that its models do not allow."""
        return OpenAI(base_url=f"{self.base_url}/v1", api_key="any", max_retries=0, _strict_response_validation=strict)


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., Server]]:
    """Starts the server of a model, once."""
    running: dict[str, Server] = {}
    with ExitStack() as stack:

        def start(name: str) -> Server:
            if name not in running:
                port = free_port()
                card, public_url = {
                    "images": (IMAGES, None),
                    "videos": (VIDEOS, None),
                    "animation": (ANIMATION, None),
                    "public": (IMAGES, "https://pictures.example/base/"),
                }[name]
                stack.enter_context(stand_in_server(card, port, public_url))
                running[name] = Server(f"http://127.0.0.1:{port}")
            return running[name]

        yield start


@pytest.fixture
def images(serve: Callable[..., Server]) -> Server:
    """A model that makes, edits and inpaints pictures."""
    return serve("images")


@pytest.fixture
def videos(serve: Callable[..., Server]) -> Server:
    """A model that makes clips from prompts, and nothing else."""
    return serve("videos")


@pytest.fixture
def animation(serve: Callable[..., Server]) -> Server:
    """A model that makes clips from an image and a prompt, and nothing else."""
    return serve("animation")


@pytest.fixture
def public(serve: Callable[..., Server]) -> Server:
    """The model of `images`, behind the public URL https://pictures.example/base."""
    return serve("public")


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[str, str]:
    """Paths of two adapters that fit the model."""
    for name in ("first", "second"):
        (tmp_path / name).touch()
    return str(tmp_path / "first"), str(tmp_path / "second")


def picture(size: tuple[int, int] = (64, 64), mode: str = "RGB", image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, (200, 100, 50, 0)[: len(mode)]).save(buffer, image_format)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image
