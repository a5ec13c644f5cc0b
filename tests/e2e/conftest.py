from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel

from pipelines.bundled import model_directory
from tests import tiny_models
from tests.e2e.server import Server, running_server
from tests.lora.adapters import save, train, with_prefix

PUBLIC_URL = "https://pictures.example/base/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundled model on one rank, for all tests that leave no trace in it.

    It makes pictures and clips from a prompt, clips from a picture, and edits pictures, but without a mask.
    """
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny FLUX.1, which makes, edits and inpaints pictures and nothing else, behind a public URL."""
    folder = tmp_path_factory.mktemp("painter")
    model = tiny_models.save("flux1", folder)
    with running_server(folder, "--model-path", str(model), "--public-url", PUBLIC_URL) as running:
        yield running


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Paths of two adapters for the bundled model: a file as trainers of diffusers write it, a folder as PEFT does."""
    folder = tmp_path_factory.mktemp("adapters")
    transformer = WanTransformer3DModel.from_pretrained(model_directory() / "transformer")
    first = train(transformer, ["to_q", "to_v"], r=4, seed=1)
    second = train(transformer, ["to_k", "ffn.net.2"], r=2, lora_alpha=8, seed=2)
    file = save(with_prefix("transformer.", first.state), folder / "first.safetensors")
    second.peft_model.save_pretrained(folder / "second")
    return str(file), str(folder / "second")
