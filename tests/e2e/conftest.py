from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel

from pipelines.bundled import model_directory
from tests import tiny_models
from tests.e2e.server import FLOAT32, Server, running_server
from tests.lora.adapters import Trained, save, train, with_prefix

PUBLIC_URL = "https://pictures.example/base/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundled model on one rank, for all tests that leave no trace in it.

    It makes pictures and clips from a prompt, clips from a picture, and edits pictures, but without a mask.
    """
    with running_server(tmp_path_factory.mktemp("server"), *FLOAT32) as running:
        yield running


@pytest.fixture(scope="package")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny FLUX.1, which makes, edits and inpaints pictures and nothing else, behind a public URL."""
    folder = tmp_path_factory.mktemp("painter")
    model = tiny_models.save("flux1", folder)
    with running_server(folder, "--model-path", str(model), "--public-url", PUBLIC_URL) as running:
        yield running


@pytest.fixture(scope="session")
def trained() -> list[Trained]:
    """Two adapters for the bundled model, by PEFT."""
    transformer = WanTransformer3DModel.from_pretrained(model_directory() / "transformer")
    return [
        train(transformer, ["to_q", "to_v"], r=4, lora_alpha=4, seed=1),
        train(transformer, ["to_k", "ffn.net.2"], r=2, lora_alpha=2, seed=2),
    ]


@pytest.fixture(scope="session")
def adapters(trained: list[Trained], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Paths of both, named as in the documents. All tests of `server` share them, and what nicknames stand for."""
    folder = tmp_path_factory.mktemp("adapters")
    first, second = (
        save(with_prefix("transformer.", adapter.state), folder / f"{name}.safetensors")
        for name, adapter in zip("AB", trained, strict=True)
    )
    return str(first), str(second)
