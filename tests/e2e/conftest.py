from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel

from deployments.command.cluster import free_ports
from pipelines.model.bundled import model_directory
from tests import tiny_models
from tests.e2e.server import FLOAT32, Server, running_server
from tests.lora.adapters import Trained, save, train, with_prefix

PUBLIC_URL = "https://pictures.example/base/"

TWO_EXPERTS = "wan2.2-t2v"
MAX_QUEUE = 3
MAX_RETRIES = 1
"""Limits of `gang_of_two`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundled model on one rank, for all tests that leave no trace in it.

    It makes images and videos from a prompt and videos from an image, and edits images, but without a mask.
    """
    with running_server(tmp_path_factory.mktemp("server"), *FLOAT32) as running:
        yield running


@pytest.fixture(scope="package")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny FLUX.1, which only makes, edits and inpaints images, behind a public URL."""
    folder = tmp_path_factory.mktemp("painter")
    model = tiny_models.save("flux1", folder)
    with running_server(folder, "--model-path", str(model), "--public-url", PUBLIC_URL) as running:
        yield running


@pytest.fixture(scope="session")
def metrics_port() -> int:
    (port,) = free_ports(1)
    return port


@pytest.fixture(scope="package")
def gang_of_two(tmp_path_factory: pytest.TempPathFactory, metrics_port: int) -> Iterator[Server]:
    """A tiny Wan 2.2, whose two experts compute the early and the late steps, on two ranks behind a short queue."""
    folder = tmp_path_factory.mktemp("gang_of_two")
    model = tiny_models.save(TWO_EXPERTS, folder)
    limits = ("--max-queue", str(MAX_QUEUE), "--max-retries", str(MAX_RETRIES))
    flags = ("--model-path", str(model), "--num-gpus", "2", *limits, "--metrics-port", str(metrics_port))
    with running_server(folder, *flags) as running:
        yield running


@pytest.fixture(scope="session")
def trained() -> list[Trained]:
    """Two adapters for the bundled model, made by PEFT."""
    transformer = WanTransformer3DModel.from_pretrained(model_directory() / "transformer")
    return [
        train(transformer, ["to_q", "to_v"], r=4, lora_alpha=4, seed=1),
        train(transformer, ["to_k", "ffn.net.2"], r=2, lora_alpha=2, seed=2),
    ]


@pytest.fixture(scope="session")
def adapters(trained: list[Trained], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Paths of both, named as in the documents. All tests of `server` share them, and the meaning of nicknames."""
    folder = tmp_path_factory.mktemp("adapters")
    first, second = (
        save(with_prefix("transformer.", adapter.state), folder / f"{name}.safetensors")
        for name, adapter in zip("AB", trained, strict=True)
    )
    return str(first), str(second)
