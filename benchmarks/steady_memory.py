"""Memory of every process of a server over hundreds of requests: it must not grow.

    python -m benchmarks.steady_memory [--requests 500] [--ranks 2]

Baseline: the same processes after an equal number of earlier requests. Ray's own tables fill during the first few
hundred: the engine's process grows by 8 MB, and by 1 MB over the next thousand.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from tests.e2e.server import Server, running_server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    flags = ("--num-gpus", str(arguments.ranks), "--video-ttl", "60")
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), *flags) as server:
        ask(server, arguments.requests)
        before = memory(server)
        ask(server, arguments.requests)
        after = memory(server)
    for process, megabytes in after.items():
        if process in before:
            print(f"{before[process]:7.1f} MB -> {megabytes:7.1f} MB ({megabytes - before[process]:+5.1f})  {process}")
    print(f"{sum(before.values()):7.1f} MB -> {sum(after.values()):7.1f} MB after {arguments.requests} requests")


def ask(server: Server, requests: int) -> None:
    """Request images, with one video and one refused request in every ten."""
    for number in range(requests):
        match number % 10:
            case 0:
                server.clip(seed=number)
            case 1:
                server.http.post("/v1/images/generations", json={"prompt": "a cat", "size": "enormous"})
            case _:
                server.picture(seed=number)


def memory(server: Server) -> dict[str, float]:
    """MB that each process holds alone (USS), by its title and id."""
    found = {}
    for process in server.processes():
        with suppress(psutil.Error):
            title = " ".join(process.cmdline()[:2])[-60:]
            found[f"{title} ({process.pid})"] = process.memory_full_info().uss / 1e6
    return found


if __name__ == "__main__":
    main()
