"""A model after merging a file, against the same model merged by PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lora.load import load, resolve
from lora.merge import Merger
from tests.lora.adapters import Trained


def assert_merges_like_peft(
    path: Path, trained: Mapping[str, Trained], pipeline_class: type, model: Mapping[str, nn.Module]
) -> None:
    """Merging into `model` gives each transformer the weights of its adapter in `trained`."""
    base = {name: {key: value.clone() for key, value in model[name].state_dict().items()} for name in trained}
    Merger(model).merge([(load(resolve(str(path)), pipeline_class, model), 1.0, ("all",))])
    for name, adapter in trained.items():
        merged = model[name].state_dict()
        changed = {key for key in base[name] if not torch.equal(base[name][key], merged[key])}
        assert changed == {key for key in base[name] if not torch.equal(base[name][key], adapter.fused[key])}
        assert changed
        for key in base[name]:
            torch.testing.assert_close(merged[key], adapter.fused[key], rtol=0, atol=1e-6)
