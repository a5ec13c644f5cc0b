from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest
from diffusers import DiffusionPipeline
from torch import nn

from pipelines.model.load import TRANSFORMERS
from tests import tiny_models

_build = cache(tiny_models.build)


@pytest.fixture
def pipeline() -> Callable[[str], DiffusionPipeline]:
    """A family's tiny pipeline. Shared: its weights must not be changed."""
    return _build


@pytest.fixture
def transformers(pipeline: Callable[[str], DiffusionPipeline]) -> Callable[[str], dict[str, nn.Module]]:
    """A copy of a family's tiny transformers by name, to merge into."""

    def copies(family: str) -> dict[str, nn.Module]:
        components = pipeline(family).components
        return {name: deepcopy(components[name]) for name in TRANSFORMERS if components.get(name) is not None}

    return copies
