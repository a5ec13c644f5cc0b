"""What the server adds: `images.generate` over HTTP minus the same diffusers pipeline called in a bare script.

    python -m benchmarks.overhead [--requests 50] [--size 64x64] [--steps 4]

Baselines, called in this process in turn with the server, so that all see the same machine: the bare pipeline, and the
same pipeline with the server's changes (an autoencoder that skips its padding, cached text encodings). Same weights,
seed, steps and thread count. The overhead is what HTTP, Ray and encoding the file add to the latter.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from openai import OpenAI

from benchmarks.timing import seconds
from pipelines.model.bundled import model_directory
from pipelines.model.convolution import skip_padding
from pipelines.model.encodings import EncodingMemory
from tests.e2e.server import running_server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    plain, improved = (DiffusionPipeline.from_pretrained(model_directory(), dtype=torch.float32) for _ in range(2))
    skip_padding(improved.vae)
    EncodingMemory().attach(improved)

    def bare(pipeline: DiffusionPipeline) -> None:
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

    for pipeline in (plain, improved):
        pipeline.set_progress_bar_config(disable=True)
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

        calls = (partial(bare, plain), partial(bare, improved), served)
        for call in calls:
            for _ in range(3):
                call()
        rounds = [[seconds(call) for call in calls] for _ in range(arguments.requests)]
    plain_p50, improved_p50, served_p50 = (1e3 * statistics.median(column) for column in zip(*rounds, strict=True))
    print(
        f"{arguments.size}, {arguments.steps} steps, {arguments.requests} requests: bare p50 {plain_p50:.1f} ms, "
        f"with the server's changes {improved_p50:.1f} ms, served {served_p50:.1f} ms: overhead "
        f"{served_p50 - improved_p50:.1f} ms, {served_p50 / plain_p50:.2f} of the bare pipeline's time"
    )


if __name__ == "__main__":
    main()
