"""Adapters for the families other than Wan on four ranks (2x2), in every format that their trainers write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import tiny_models
from tests.e2e.pictures import pixels
from tests.e2e.server import running_server
from tests.lora.adapters import save, train
from tests.lora.formats import FORMATS

FAMILIES = sorted({family for family, _, _ in FORMATS.values() if not family.startswith("wan")})
RANKS = ("--num-gpus", "4", "--ulysses-degree=2", "--ring-degree=2", "--dtype", "fp32")
SEED = {"seed": 7}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_in_any_format_gives_the_picture_of_what_peft_saved(
    family: str, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    model = tiny_models.save(family, tmp_path)
    transformer = tiny_models.build(family).transformer
    with running_server(tmp_path, "--model-path", str(model), *RANKS) as server:
        base = pixels(server.picture(**SEED))
        for name in (name for name, (of, _, _) in FORMATS.items() if of == family):
            with subtests.test(format=name):
                _, layers, make = FORMATS[name]
                trained = train(transformer, layers, r=4, lora_alpha=16)
                trained.peft_model.save_pretrained(tmp_path / name)
                file = save(make(trained), tmp_path / f"{name}.safetensors")
                by_peft = pixels(server.picture(**SEED, lora={"path": str(tmp_path / name)}))
                foreign = pixels(server.picture(**SEED, lora={"path": str(file)}))
                assert np.abs(by_peft - foreign).max() <= 1
                assert np.abs(by_peft - base).max() > 10
