from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import FLOAT32, Server, running_server

DOCUMENTED = (
    "--text-encoder-cpu-offload",
    "--pin-cpu-memory",
    "--num-gpus",
    "4",
    "--ulysses-degree=2",
    "--ring-degree=2",
)
"""Flags of the command in SGLang's documents."""


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's folder of adapters, where tests put them."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="package")
def four_ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    adapters = ("--lora-dir", str(folder), "--lora-restore", "reload")
    with running_server(tmp_path_factory.mktemp("four_ranks"), *DOCUMENTED, *adapters, *FLOAT32) as running:
        yield running
