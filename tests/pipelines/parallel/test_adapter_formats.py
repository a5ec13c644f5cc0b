"""An adapter in any public format computes what PEFT's own fused model computes, on one rank and on 2x2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from configs.parallel import ParallelDims
from configs.server_args import ServerArgs
from lora.load import load, resolve
from lora.merge import Merger
from pipelines.job import Task
from pipelines.model.load import Model, load_model
from pipelines.parallel.mesh import Mesh
from tests import tiny_models
from tests.gang import Gang
from tests.lora.adapters import save, train
from tests.lora.formats import FORMATS
from tests.pipelines.parallel.comparison import Comparison, compare
from tests.pipelines.parallel.generations import latents

pytestmark = pytest.mark.gang

SQUARE = ParallelDims(ulysses_degree=2, ring_degree=2)


def latents_with_each(model: Model, task: Task, files: Sequence[Path]) -> list[torch.Tensor]:
    """A job's latents with one adapter after the other in the weights."""
    merger = Merger(model.transformers)
    results = []
    for file in files:
        factors = load(resolve(str(file)), type(model.pipeline), model.transformers)
        merger.merge([(factors, 1.0, ("all",))])
        results.append(latents(model, task))
    return results


def compare_with_each(
    mesh: Mesh, path: Path, task: Task, files: Sequence[Path], expected: Sequence[torch.Tensor]
) -> list[Comparison]:
    args = ServerArgs(model_path=str(path), device="cpu", dtype="fp32", num_gpus=4, ulysses_degree=2, ring_degree=2)
    with tiny_models.small_reference_images():
        results = latents_with_each(load_model(args, mesh), task, files)
    return [compare(*pair) for pair in zip(results, expected, strict=True)]


@pytest.mark.parametrize("family", sorted({family for family, _, _ in FORMATS.values()}))
def test_an_adapter_in_any_format_computes_what_pefts_own_fused_model_computes(
    gang: Gang, tiny_model_path: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    path = tiny_model_path(family)
    model = load_model(ServerArgs(model_path=str(path), device="cpu", dtype="fp32"))
    task = Task(next(iter(model.card.family.tasks)))
    transformer = model.transformers["transformer"]
    original = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    base = latents(model, task)

    files, expected = [], []
    for name, (of, layers, make) in FORMATS.items():
        if of != family:
            continue
        trained = train(tiny_models.build(family).transformer, layers, r=4, lora_alpha=16)
        trained.peft_model.save_pretrained(tmp_path / f"{name}, as PEFT saves it")
        transformer.load_state_dict(trained.fused)
        fused = latents(model, task)
        assert compare(fused, base).error > 1e-2, f"{name}: the adapter changes next to nothing"
        files += [tmp_path / f"{name}, as PEFT saves it", save(make(trained), tmp_path / f"{name}.safetensors")]
        expected += [fused, fused]
    transformer.load_state_dict(original)

    for file, result, fused in zip(files, latents_with_each(model, task, files), expected, strict=True):
        assert compare(result, fused).error <= 1e-5, file.name
    for by_rank in gang.run(compare_with_each, SQUARE, path, task, files, expected):
        for file, comparison in zip(files, by_rank, strict=True):
            assert comparison.error <= 1e-5, file.name
