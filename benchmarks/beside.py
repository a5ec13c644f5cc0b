"""This server and another with the same API (SGLang Diffusion's) in turn, on one machine, with the same weights.

    python -m benchmarks.beside --save models
    …                                              # start the other server on models/wan2.1-t2v
    python -m benchmarks.beside http://localhost:31999 --process-group 4711 --model models/wan2.1-t2v [--ranks 2]

The other server is started by hand. It is stopped (SIGSTOP) while ours is measured, because it may keep a core busy
when idle; ours stays idle while the other is measured. Each gets its requests in blocks, every one with a new prompt,
because ours remembers encodings.

SGLang 0.5.23 comes without its CPU kernels, which need AMX. On a machine without them, replace `forward_cpu` of its two
fused norms by its own `forward_native`, and `_fuse_scale_shift_kernel_cpu` by `x * (scale_constant + scale) + shift`.
Where the CPU has no bfloat16, it is fastest with `--dit-precision fp32 --vae-precision fp32 --vae-decode-precision fp32
--text-encoder-precisions fp32` (by default it decodes in bfloat16: 1.8 s for a small video instead of 0.4 s).
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx2

from benchmarks.latency import CASES, Case
from benchmarks.timing import seconds
from tests.e2e.server import running_server
from tests.tiny_models import save

POLL_SECONDS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", help="of the other server")
    parser.add_argument("--process-group", type=int, help="of the other server")
    parser.add_argument("--model", type=Path, help="what it serves, one of those that --save wrote")
    parser.add_argument("--ranks", type=int, default=1, help="of ours")
    parser.add_argument("--case", default="", help="only those with this in their name")
    parser.add_argument("--requests", type=int, default=10, help="of a block")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the models there, and end")
    arguments = parser.parse_args()
    if arguments.save:
        for model in {case.model for case in CASES}:
            print(save(model, arguments.save))
        return
    prompts = (f"a cat, take {number}" for number in itertools.count())
    flags = ("--model-path", str(arguments.model.resolve()), "--num-gpus", str(arguments.ranks))
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), *flags) as server:
        for case in (case for case in CASES if case.model == arguments.model.name and arguments.case in case.name):
            ours, others = [], []
            for _ in range(arguments.blocks):
                with stopped(arguments.process_group):
                    ours.append(p50(server.base_url, case, prompts, arguments.requests))
                others.append(p50(arguments.url, case, prompts, arguments.requests))
            ratio = statistics.median(ours) / statistics.median(others)
            print(
                f"{case.name}, {arguments.ranks} rank(s): ours {listed(ours)}, the other {listed(others)}: {ratio:.2f}"
            )


@contextmanager
def stopped(process_group: int) -> Iterator[None]:
    os.killpg(process_group, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(process_group, signal.SIGCONT)


def p50(url: str, case: Case, prompts: Iterator[str], requests: int) -> float:
    """Median milliseconds from a request to the finished file, after two warm-up requests."""
    with httpx2.Client(base_url=url, timeout=600) as http:
        ask = partial(clip if case.num_frames > 1 else picture, http, case)
        ask(next(prompts))
        ask(next(prompts))
        return 1e3 * statistics.median(seconds(partial(ask, next(prompts))) for _ in range(requests))


def picture(http: httpx2.Client, case: Case, prompt: str) -> None:
    http.post("/v1/images/generations", json={**body(case, prompt), "response_format": "b64_json"}).raise_for_status()


def clip(http: httpx2.Client, case: Case, prompt: str) -> None:
    fields = {**body(case, prompt), "num_frames": case.num_frames, "fps": 16}
    video = http.post("/v1/videos", json=fields).raise_for_status().json()
    while video["status"] != "completed":
        if video["status"] == "failed":
            raise SystemExit(f"{http.base_url} failed: {video['error']}")
        time.sleep(POLL_SECONDS)
        video = http.get(f"/v1/videos/{video['id']}").raise_for_status().json()
    http.get(f"/v1/videos/{video['id']}/content").raise_for_status()


def body(case: Case, prompt: str) -> dict[str, object]:
    return {
        "prompt": prompt,
        "size": f"{case.width}x{case.height}",
        "num_inference_steps": case.steps,
        "seed": 1,
    }


def listed(milliseconds: list[float]) -> str:
    return " ".join(f"{each:.0f}" for each in milliseconds) + " ms"


if __name__ == "__main__":
    main()
