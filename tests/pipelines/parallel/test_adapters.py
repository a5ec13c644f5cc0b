"""Adapters in the weights of a real model, on one rank and on 2x2: exact while merged, gone without a trace after."""

from __future__ import annotations

import random
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from unittest import mock

import pytest
import torch

from configs.parallel import ParallelDims
from configs.server_args import ServerArgs
from lora import merge
from lora.load import load, resolve
from lora.merge import Merger
from lora.originals import Checkpoint, HostCopies
from pipelines.model.load import Model, load_model
from pipelines.parallel.mesh import Mesh
from tests import tiny_models
from tests.gang import Gang
from tests.lora.adapters import save, train, with_prefix

pytestmark = pytest.mark.gang

FAMILY = "wan2.2-t2v"
"""A model of two experts."""

SQUARE = ParallelDims(ulysses_degree=2, ring_degree=2)

LAYERS = {
    "attention": r"blocks\.\d+\.attn1\.to_[qkv]",
    "overlapping": r"blocks\.[12]\.(attn1\.to_q|attn2\.to_v)",
    "convolution": "patch_embedding",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters made by PEFT."""
    folder = tmp_path_factory.mktemp("adapters")
    transformer = tiny_models.build(FAMILY).transformer
    return [
        save(with_prefix("transformer.", train(transformer, layers, seed=seed).state), folder / f"{name}.safetensors")
        for seed, (name, layers) in enumerate(LAYERS.items())
    ]


def loaded(path: Path, dtype: str, mesh: Mesh | None) -> Model:
    ranks = {"num_gpus": 4, "ulysses_degree": 2, "ring_degree": 2} if mesh is not None else {}
    return load_model(ServerArgs(model_path=str(path), device="cpu", dtype=dtype, **ranks), mesh)


def checksums(model: Model) -> dict[str, str]:
    """Of every weight of the transformers."""
    return {
        f"{name}.{key}": sha256(tensor.detach().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, transformer in model.transformers.items()
        for key, tensor in transformer.state_dict().items()
    }


class Injected(Exception):
    pass


def write_sum_failing_after(count: int) -> Callable[..., None]:
    """A merge's write that, after `count` good ones, fails halfway, as if out of memory."""
    write_sum, calls = merge._write_sum, iter(range(1_000_000))

    def failing(parameter: torch.Tensor, *rest: object) -> None:
        if next(calls) == count:
            parameter.flatten()[: parameter.numel() // 2].fill_(7)
            raise Injected
        write_sum(parameter, *rest)  # type: ignore[arg-type]

    return failing


def after_any_sequence(
    mesh: Mesh | None, path: Path, dtype: str, restore: str, files: list[Path], seed: int
) -> tuple[dict[str, str], list[str]]:
    """The checksums after merges, switches, restores, misfits and failures, and a digest of each merged state."""
    model = loaded(path, dtype, mesh)
    originals = Checkpoint(model.transformers, model.directory) if restore == "reload" else HostCopies()
    merger, chance = Merger(model.transformers, originals), random.Random(seed)
    adapters = [load(resolve(str(file)), type(model.pipeline), model.transformers) for file in files]
    states = []
    for _ in range(20):
        chosen = chance.sample(adapters, chance.randint(1, 3))
        composition = [
            (adapter, chance.choice([0.3, 1.0]), chance.choice([("all",), ("transformer_2",)])) for adapter in chosen
        ]
        match chance.choice(["merge", "merge", "restore", "fail"]):
            case "merge":
                merger.merge(composition)
            case "restore":
                merger.restore()
            case "fail":
                with mock.patch.object(merge, "_write_sum", write_sum_failing_after(chance.randint(0, 9))):
                    try:
                        merger.merge(composition)
                    except Injected:
                        assert not merger.holds_a_merge
        states.append(sha256(repr(checksums(model)).encode()).hexdigest())
    assert merger.num_bytes_held == 0 or restore == "copy"
    merger.restore()
    return checksums(model), states


@pytest.mark.parametrize("restore", ["copy", "reload"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_sequence_leaves_a_trace_in_any_weight_of_any_rank(
    gang: Gang, tiny_model_path: Callable[[str], Path], files: list[Path], dtype: str, restore: str
) -> None:
    path = tiny_model_path(FAMILY)
    expected = checksums(loaded(path, dtype, None))
    weights, states = after_any_sequence(None, path, dtype, restore, files, seed=1)
    assert weights == expected
    assert len(set(states)) > 6, "the sequence merges next to nothing"
    for rank_weights, rank_states in gang.run(after_any_sequence, SQUARE, path, dtype, restore, files, seed=1):
        assert rank_weights == expected
        assert rank_states == states
