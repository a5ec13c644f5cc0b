"""Measures which lines and branches a process executes, in every process of a test run; see `benchmarks.coverage`.

Python executes this file at the start of each process that has `COVERAGE_HOOK` in its environment. Processes of the
tests are killed without warning, so what was executed is written every second.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import coverage

SAVE_SECONDS = 1.0

repository = Path(os.environ["COVERAGE_HOOK"]).resolve().parents[1]
measurement = coverage.Coverage(
    data_file=os.environ["COVERAGE_DATA"],
    data_suffix=True,  # a file per process
    config_file=False,
    branch=True,
    include=[f"{repository}/{package}/*" for package in ("configs", "lora", "pipelines", "deployments")],
    # Generations run in greenlets of their own.
    concurrency=["thread", "greenlet"],
)
measurement._warn_no_data = False


def save_forever() -> None:
    while True:
        time.sleep(SAVE_SECONDS)
        measurement.save()


def start_saving() -> None:
    threading.Thread(target=save_forever, daemon=True).start()


measurement.start()
start_saving()
os.register_at_fork(after_in_child=start_saving)
