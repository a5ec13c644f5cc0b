"""Warm latency from request to finished file, on 1, 2 and 4 ranks, compared with the bare pipeline.

    python -m benchmarks.latency [--ranks 1 2 4] [--requests 10]

Baseline in the same run: the same diffusers pipeline called in this process with one thread, in turn with the server,
file encoding included. SGLang Diffusion 0.5.23's latencies on a 2-core CPU machine (native Wan path, one thread) are
quoted for orientation: 157 ms, 416 ms and 542 ms on 1, 2 and 4 ranks for the small video, and on one rank 2884 ms for
the large video and 69 ms for a FLUX image.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from benchmarks.timing import seconds
from pipelines.media.encode import encode_image, encode_video
from pipelines.media.outputs import to_frame
from tests.e2e.server import Server, running_server
from tests.tiny_models import save


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    width: int
    height: int
    num_frames: int
    steps: int
    sglang_ms: dict[int, float]


CASES = (
    Case("clip 64x64, 5 frames, 4 steps", "wan2.1-t2v", 64, 64, 5, 4, {1: 157, 2: 416, 4: 542}),
    Case("clip 256x256, 17 frames, 10 steps", "wan2.1-t2v", 256, 256, 17, 10, {1: 2884}),
    Case("picture 64x64, 4 steps", "flux1", 64, 64, 1, 4, {1: 69}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--requests", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for model in dict.fromkeys(case.model for case in CASES):
            directory = save(model, Path(folder))
            for ranks in arguments.ranks:
                with running_server(Path(folder), "--model-path", str(directory), "--num-gpus", str(ranks)) as server:
                    for case in (case for case in CASES if case.model == model):
                        print(compare(case, directory, server, ranks, arguments.requests), flush=True)


def compare(case: Case, directory: Path, server: Server, ranks: int, requests: int) -> str:
    pipeline = DiffusionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)

    # New to the server, which remembers encodings: the name tells this case's from those of another on the same server.
    prompts = (f"a cat in a {case.name}, take {number}" for number in itertools.count())

    def bare() -> None:
        frames = {"num_frames": case.num_frames} if case.num_frames > 1 else {}
        pixels = pipeline(
            next(prompts),
            width=case.width,
            height=case.height,
            num_inference_steps=case.steps,
            output_type="pt",
            return_dict=False,
            **frames,
        )[0][0]
        if case.num_frames > 1:
            encode_video((to_frame(frame) for frame in pixels), fps=16)
        else:
            encode_image(to_frame(pixels), "png")

    def served() -> None:
        size = f"{case.width}x{case.height}"
        if case.num_frames > 1:
            server.clip(prompt=next(prompts), size=size, num_inference_steps=case.steps, num_frames=case.num_frames)
        else:
            server.picture(prompt=next(prompts), size=size, num_inference_steps=case.steps)

    for _ in range(2):
        bare()
        served()
    pairs = [(seconds(bare), seconds(served)) for _ in range(requests)]
    bare_p50, served_p50 = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    quoted = case.sglang_ms.get(ranks)
    beside = f", {served_p50 / quoted:.2f} of SGLang's {quoted:.0f} ms" if quoted else ""
    return (
        f"{case.name}, {ranks} rank(s): bare {bare_p50:.0f} ms, served {served_p50:.0f} ms "
        f"(ratio {served_p50 / bare_p50:.2f}){beside}"
    )


if __name__ == "__main__":
    main()
