"""What swapping adapters costs: requests that alternate among four, against the same requests with one.

    python -m benchmarks.lora_alternating [--requests 20] [--adapters 4] [--size 128x128] [--steps 4] [--repeats 1]

A real server has a model of 400M parameters (Wan 2.1 1.3B's widths, random weights) and adapters on all linear layers
of its blocks, all in the server's cache. Requests arrive all at once, so that the engine may group them, and then one
after the other, so that it cannot and every request swaps. Baseline in the same run: the same requests, all with the
merged adapter. Prints the medians and the share lost to swaps, of wall time and of the rank's CPU time; the latter is
meaningful even on a machine that is busy with something else. Takes ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel

from benchmarks.lora_switch import adapter
from pipelines.model.bundled import model_directory
from tests.e2e.server import Server, running_server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        transformer = save_model(folder / "model")
        files = [adapter(transformer, 32, folder / f"adapter-{index}") for index in range(arguments.adapters)]
        del transformer
        with running_server(folder, "--model-path", str(folder / "model"), "--dtype", arguments.dtype) as server:
            compare(server, files, arguments)


def compare(server: Server, files: Sequence[Path], arguments: argparse.Namespace) -> None:
    request = {"size": arguments.size, "num_inference_steps": arguments.steps, "seed": 7}
    names = [f"adapter-{index}" for index in range(len(files))]
    for name, file in zip(names, files, strict=True):
        server.picture(**request, lora={"nickname": name, "path": str(file)})
    alternating = [names[index % len(names)] for index in range(arguments.requests)]
    same = names[:1] * arguments.requests

    for way, concurrency in {"all at once": arguments.requests, "one after the other": 1}.items():

        def cost(choices: Sequence[str], concurrency: int = concurrency) -> Cost:
            server.picture(**request, lora=choices[0])
            started, cpu_before = time.perf_counter(), rank_seconds(server)
            with ThreadPoolExecutor(concurrency) as pool:
                list(pool.map(lambda name: server.picture(**request, lora=name), choices))
            return Cost(time.perf_counter() - started, rank_seconds(server) - cpu_before)

        pairs = [(cost(same), cost(alternating)) for _ in range(arguments.repeats)]
        one, several = (Cost.median(column) for column in zip(*pairs, strict=True))
        print(
            f"{arguments.requests} requests {way}: {one.clock:.1f} s with one adapter, {several.clock:.1f} s over "
            f"{len(names)}, {1 - one.clock / several.clock:.1%} lost to swaps; "
            f"CPU {one.cpu:.1f} s and {several.cpu:.1f} s, {1 - one.cpu / several.cpu:.1%}",
            flush=True,
        )


@dataclass(frozen=True)
class Cost:
    """Seconds."""

    clock: float
    cpu: float

    @classmethod
    def median(cls, costs: Sequence[Cost]) -> Cost:
        return cls(statistics.median(c.clock for c in costs), statistics.median(c.cpu for c in costs))


def rank_seconds(server: Server) -> float:
    """CPU time of the server's rank so far."""
    (rank,) = server.processes("ray::Rank")
    times = rank.cpu_times()
    return times.user + times.system


def save_model(directory: Path) -> WanTransformer3DModel:
    """Save the bundled pipeline with a transformer of 8 of Wan 2.1 1.3B's 30 layers; return that transformer."""
    pipeline = DiffusionPipeline.from_pretrained(model_directory(), dtype=torch.float32)
    widths = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 8}
    torch.manual_seed(0)
    transformer = WanTransformer3DModel.from_config({**pipeline.transformer.config, **widths})
    for parameter in transformer.requires_grad_(False).parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    pipeline.transformer = transformer.to(torch.bfloat16)
    pipeline.save_pretrained(directory)
    if (overrides := model_directory() / "ditserve.yaml").exists():
        shutil.copy(overrides, directory)
    return transformer


if __name__ == "__main__":
    main()
