"""What the server adds: `images.generate` over HTTP minus the same diffusers pipeline called in a bare script.

    python -m benchmarks.overhead [--requests 50] [--size 64x64] [--steps 4]

Baseline: the bare pipeline, in this process, called in turn with the server, so that both see the same machine. Same
weights, seed, steps and thread count.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from openai import OpenAI

from benchmarks.timing import seconds
from pipelines.bundled import model_directory
from tests.e2e.server import running_server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    pipeline = DiffusionPipeline.from_pretrained(model_directory(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def bare() -> None:
        pipeline(
            "a cat",
            negative_prompt="",
            width=width,
            height=height,
            num_frames=1,
            num_inference_steps=arguments.steps,
            guidance_scale=5.0,
            generator=torch.Generator("cpu").manual_seed(7),
        )

    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), "--dtype", "fp32") as server:
        client = OpenAI(api_key="none", base_url=f"{server.base_url}/v1")

        def served() -> None:
            client.images.generate(
                prompt="a cat",
                size=arguments.size,
                extra_body={
                    "negative_prompt": "",
                    "num_inference_steps": arguments.steps,
                    "guidance_scale": 5.0,
                    "seed": 7,
                },
            )

        for call in (bare, served):
            for _ in range(3):
                call()
        pairs = [(seconds(bare), seconds(served)) for _ in range(arguments.requests)]
    bare_p50, served_p50 = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{arguments.size}, {arguments.steps} steps, {arguments.requests} requests: bare p50 {bare_p50:.1f} ms, "
        f"served p50 {served_p50:.1f} ms, overhead {served_p50 - bare_p50:.1f} ms (ratio {served_p50 / bare_p50:.2f})"
    )


if __name__ == "__main__":
    main()
