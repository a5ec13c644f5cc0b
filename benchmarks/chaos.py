"""Kills a server's processes under load: which jobs are lost, which are wrong, how fast the server recovers.

    python -m benchmarks.chaos [--runs 10] [--jobs 200] [--clients 16] [--ranks 2] [--seed 1]

Baseline: the same jobs on the same server before the first process is killed. Every later job must give the same
output, byte for byte.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from tests.chaos.storm import Report, Storm
from tests.e2e.server import running_server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    reports = []
    for run in range(arguments.runs):
        started = time.monotonic()
        with (
            tempfile.TemporaryDirectory() as folder,
            running_server(Path(folder), "--num-gpus", str(arguments.ranks), "--max-retries", "10") as server,
        ):
            storm = Storm(server, seed=arguments.seed + run, jobs=arguments.jobs, clients=arguments.clients)
            reports.append(storm.run())
        print_report(f"run {run + 1}, {time.monotonic() - started:.0f} s", [reports[-1]])
    print_report("all", reports)
    return 0 if all(report.clean for report in reports) else 1


def print_report(title: str, reports: list[Report]) -> None:
    jobs, lost, wrong, hung = (
        sum(counts)
        for counts in zip(
            *((each.jobs, len(each.lost), len(each.wrong), len(each.hung)) for each in reports), strict=True
        )
    )
    print(f"{title}: {jobs} jobs, {lost} lost, {wrong} wrong, {hung} hung", flush=True)
    seconds = defaultdict(list)
    for report in reports:
        for fault in (*report.lost, *report.wrong, *report.hung):
            print(f"  {fault}")
        for kind, healed in report.losses:
            seconds[kind].append(healed)
    for kind, healed in seconds.items():
        median = statistics.median(healed)
        print(f"  {kind}: lost {len(healed)} times, ready after {median:.1f} s, at most {max(healed):.1f} s")


if __name__ == "__main__":
    sys.exit(main())
