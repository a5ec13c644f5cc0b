"""Which lines and branches of the four packages the tests execute, in all processes: `make coverage`.

    python -m benchmarks.coverage_of_tests [pytest's arguments]

Tests start processes that start others (Ray's workers, ranks, a forked rank's children) and kill some of them, so each
measures itself, under a hook that only this script sets (`benchmarks/coverage_hook.py`). At the end their data is
combined to `.coverage` and reported; `coverage json` and `coverage html` show more of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

import coverage

HOOK = Path(__file__).with_name("coverage_hook.py")

STARTER = Path(sysconfig.get_path("purelib"), "ditserve_coverage.pth")
"""Python executes the lines of such files at the start of every process of this environment."""

DATA = ".coverage"
"""Name of the result, and what the names of the processes' own begin with."""

START = 'import os; hook = os.environ.get("COVERAGE_HOOK"); hook and exec(open(hook).read(), {})\n'


def main() -> int:
    # In memory: a disk that flushes what some fifty processes write each second slows the tests by half. A process that
    # outlives the tests for a moment may still write.
    with TemporaryDirectory(prefix="coverage-", dir="/dev/shm", ignore_cleanup_errors=True) as folder:
        data = str(Path(folder, DATA))
        STARTER.write_text(START)
        try:
            environment = {**os.environ, "COVERAGE_HOOK": str(HOOK), "COVERAGE_DATA": data}
            status = subprocess.run([sys.executable, "-m", "pytest", *sys.argv[1:]], env=environment).returncode
        finally:
            STARTER.unlink()
        combined = coverage.Coverage(data_file=DATA, config_file=False, branch=True)
        combined.combine([folder])
        combined.save()
        combined.report(show_missing=False, skip_covered=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
