"""Time from start to ready, memory and idle CPU of the whole process tree, on one rank and on four.

    python -m benchmarks.start [--ranks 1 4] [--runs 3]

Baseline: SGLang Diffusion 0.5.23 with a tiny random Wan on a 2-core CPU machine of the same kind took 22 s (one rank)
and 59 s (four) to be healthy, held 1642 MB and 3060 MB (PSS), and kept one core busy when idle. It is not installed
here, so those figures are quoted, not measured again; `import torch` in a fresh process is timed before each run as a
measure of how fast the machine is at that moment.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import psutil

from tests.e2e.server import running_server

SGLANG = {1: (22.0, 1642), 2: (34.0, 1918), 4: (59.0, 3060)}
"""Seconds to healthy and MB of PSS, by number of ranks."""

IDLE_SECONDS = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    for ranks in arguments.ranks:
        runs = [measure(ranks) for _ in range(arguments.runs)]
        ready, memory, idle, torch_import = (statistics.median(column) for column in zip(*runs, strict=True))
        sglang_ready, sglang_memory = SGLANG[ranks]
        print(
            f"{ranks} rank(s): ready {ready:.1f} s ({ready / sglang_ready:.2f} of SGLang's {sglang_ready:.0f} s, "
            f"{ready / torch_import:.1f} x import torch), memory {memory:.0f} MB "
            f"({memory / sglang_memory:.2f} of SGLang's {sglang_memory} MB), idle {idle:.2f} core"
        )


def measure(ranks: int) -> tuple[float, float, float, float]:
    """Seconds to ready, MB of PSS, idle cores, and the seconds `import torch` takes."""
    torch_import = seconds_of([sys.executable, "-c", "import torch"])
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with running_server(Path(folder), "--num-gpus", str(ranks)) as server:
            httpx2.get(f"{server.base_url}/ready", timeout=60).raise_for_status()
            ready = time.perf_counter() - started
            time.sleep(5)
            tree = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
            memory = sum(process.memory_full_info().pss for process in tree) / 1e6
            before = cpu_seconds(tree)
            time.sleep(IDLE_SECONDS)
            idle = (cpu_seconds(tree) - before) / IDLE_SECONDS
    return ready, memory, idle, torch_import


def seconds_of(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes if process.is_running())


if __name__ == "__main__":
    main()
