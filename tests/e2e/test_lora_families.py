"""Adapters for the families other than Wan on four ranks (2x2), in every format that their trainers write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import tiny_models
from tests.e2e.pictures import pixels
from tests.e2e.server import Server, running_server
from tests.lora.adapters import save, train
from tests.lora.formats import FORMATS

CASES = [(family, name) for name, (family, _, _) in FORMATS.items() if not family.startswith("wan")]
"""Those of a family follow each other, and share its server."""


@pytest.fixture(scope="module")
def four_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_models.save(request.param, folder)
    ranks = ("--num-gpus", "4", "--ulysses-degree=2", "--ring-degree=2", "--dtype", "fp32")
    with running_server(folder, "--model-path", str(model), *ranks) as running:
        yield running


@pytest.mark.parametrize(("four_ranks", "format_name"), CASES, indirect=["four_ranks"])
def test_an_adapter_in_any_format_gives_the_picture_of_what_peft_saved(
    four_ranks: Server, tmp_path: Path, format_name: str
) -> None:
    family, layers, make = FORMATS[format_name]
    trained = train(tiny_models.build(family).transformer, layers, r=4, lora_alpha=16)
    trained.peft_model.save_pretrained(tmp_path / "peft")
    file = save(make(trained), tmp_path / "foreign.safetensors")
    seed = {"seed": 7}
    base = pixels(four_ranks.picture(**seed))
    by_peft = pixels(four_ranks.picture(**seed, lora={"path": str(tmp_path / "peft")}))
    foreign = pixels(four_ranks.picture(**seed, lora={"path": str(file)}))
    assert np.abs(by_peft - foreign).max() <= 1
    assert np.abs(by_peft - base).max() > 10
