"""How exactly, and how fast, four ranks compute what one computes: every family, degree, length and mask.

    python -m benchmarks.sharded_equals_unsharded [--family FLUX.1 …] [--repeats 3]

The baseline is the same forward, unsharded, on rank 0 just before, with one thread. The transformers are tiny, so most
of their time goes to collectives; `--speed` takes one that is large enough for sharding to pay off (27M parameters,
1950 tokens). With fewer free cores than ranks, the ratio is at best ranks / cores times the ideal one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor

from configs.parallel import ParallelDims
from pipelines.parallel.mesh import Mesh
from pipelines.parallel.sequence import shard_sequence
from tests.gang import Gang
from tests.pipelines.parallel import forwards
from tests.pipelines.parallel.comparison import Comparison, compare
from tests.pipelines.parallel.forwards import EVEN, FORWARDS, MASKED, MASKED_UNEVEN, UNEVEN, Sizes

DEGREES = ((4, 1), (1, 4), (2, 2))
"""(ulysses_degree, ring_degree)"""


Case = tuple[torch.nn.Module, dict[str, Any]]
"""A transformer and the arguments of a forward."""


def tiny(name: str, sizes: Sizes) -> Case:
    return forwards.transformer(name), forwards.arguments(name, sizes)


def wan_27m() -> Case:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=8, attention_head_dim=48, text_dim=64, freq_dim=64, ffn_dim=1536, num_layers=8
    )
    arguments = {
        "hidden_states": torch.randn(1, 16, 5, 30, 52),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": torch.randn(1, 512, 64),
        "return_dict": False,
    }
    return transformer.eval(), arguments


@dataclass(frozen=True)
class Measurement:
    comparison: Comparison
    alone: float
    """Seconds that rank 0 takes while the others wait."""
    sharded: float
    """Seconds that all take together."""


def measure(mesh: Mesh, repeats: int, make_case: Callable[..., Case], *args: Any) -> Measurement:
    transformer, arguments = make_case(*args)
    expected, alone = torch.empty(0), 0.0
    if mesh.rank == 0:
        expected, alone = timed(transformer, arguments, repeats)
    shard_sequence(transformer, mesh)
    # The first forward includes one-time work, and waits for rank 0.
    result = forwards.output(transformer, arguments)
    if mesh.rank != 0:
        expected = torch.empty(result.shape)
    dist.broadcast(expected, group_src=0, group=mesh.group)
    return Measurement(compare(result, expected), alone, timed(transformer, arguments, repeats)[1])


def timed(transformer: torch.nn.Module, arguments: dict[str, Any], repeats: int) -> tuple[Tensor, float]:
    """The output, and the median time in seconds of `repeats` forwards after a first one."""
    output = forwards.output(transformer, arguments).contiguous()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        forwards.output(transformer, arguments)
        times.append(time.perf_counter() - started)
    return output, statistics.median(times)


def row(name: str, degrees: tuple[int, int], sizes: str, measurements: list[Measurement]) -> str:
    worst = max(measurements, key=lambda measurement: measurement.comparison.error)
    agree = len({measurement.comparison.digest for measurement in measurements}) == 1
    ratio = max(measurement.sharded for measurement in measurements) / measurements[0].alone
    exact = "yes" if worst.comparison.exact else "no"
    ulysses, ring = degrees
    return (
        f"| {name} | {ulysses}x{ring} | {sizes} | {worst.comparison.error:.1e} | {exact} "
        f"| {'yes' if agree else 'NO'} | {ratio:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", default=list(FORWARDS), choices=list(FORWARDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--speed", action="store_true", help="time the larger transformer, and nothing else")
    options = parser.parse_args()

    print("| transformer | ulysses x ring | tokens | relative L2 | bit-exact | ranks agree | time / one rank's |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        gang = Gang(Path(directory))
        for degrees in DEGREES:
            dims = ParallelDims(ulysses_degree=degrees[0], ring_degree=degrees[1])
            if options.speed:
                print(row("Wan, 27M", degrees, "1950", gang.run(measure, dims, options.repeats, wan_27m)), flush=True)
                continue
            for name in options.family:
                cases = {"even": EVEN, "uneven": UNEVEN}
                if FORWARDS[name].masks:
                    cases |= {"even, mask": MASKED, "uneven, mask": MASKED_UNEVEN}
                for tokens, sizes in cases.items():
                    measurements = gang.run(measure, dims, options.repeats, tiny, name, sizes)
                    print(row(name, degrees, tokens, measurements), flush=True)
        gang.close()


if __name__ == "__main__":
    main()
