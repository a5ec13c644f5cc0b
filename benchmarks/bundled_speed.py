"""How long images and a video of the bundled model take, with the server's defaults, from request to file.

    python -m benchmarks.bundled_speed [--requests 3]

Baseline in the same run: the same pipeline called in this process, in turn with the server, with as many threads and in
the precision that the server chooses. The seconds "asked for" are targets for two CPU cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline

from benchmarks.timing import seconds
from configs.model_family import family_in
from pipelines.model.bundled import model_directory
from pipelines.model.precision import resolve_dtype
from tests.e2e.server import running_server

PROMPT = "A calico cat playing a piano on stage"


@dataclass(frozen=True)
class Case:
    width: int
    height: int
    asked_for: float
    """Target wall time in seconds."""
    clip_seconds: int = 0
    """0 asks for an image."""

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"


CASES = (Case(256, 256, 3), Case(1024, 1024, 30), Case(512, 288, 60, clip_seconds=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3)
    arguments = parser.parse_args()
    family = family_in(model_directory())
    assert family is not None
    torch.set_num_threads(os.cpu_count() or 1)
    pipeline = WanPipeline.from_pretrained(model_directory(), dtype=resolve_dtype("auto", torch.device("cpu")))
    pipeline.set_progress_bar_config(disable=True)
    print(f"{'seconds':22}{'served':>10}{'bare':>10}{'asked for':>12}")
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder)) as server:
        for case in CASES:
            num_frames = case.clip_seconds * family.defaults.fps + 1
            fields: Mapping[str, Any] = {
                "prompt": PROMPT,
                "seed": 7,
                "size": case.size,
                "num_inference_steps": family.defaults.num_inference_steps,
            }

            def served(num_frames: int = num_frames, fields: Mapping[str, Any] = fields) -> None:
                if num_frames == 1:
                    server.picture(**fields)
                else:
                    server.clip(**fields, num_frames=num_frames)

            def bare(case: Case = case, num_frames: int = num_frames) -> None:
                pipeline(
                    PROMPT,
                    width=case.width,
                    height=case.height,
                    num_frames=num_frames,
                    num_inference_steps=family.defaults.num_inference_steps,
                    guidance_scale=family.defaults.guidance_scale,
                )

            times = [(seconds(served), seconds(bare)) for _ in range(arguments.requests)]
            with_server, without = map(statistics.median, zip(*times, strict=True))
            name = case.size if num_frames == 1 else f"{case.size}, {num_frames} frames"
            print(f"{name:22}{with_server:10.2f}{without:10.2f}{case.asked_for:12.0f}", flush=True)


if __name__ == "__main__":
    main()
