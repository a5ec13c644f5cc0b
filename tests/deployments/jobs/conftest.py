from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.jobs import JobStore


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "state" / "jobs.sqlite3")


@pytest.fixture
def store(path: str) -> Iterator[JobStore]:
    store = JobStore(path)
    yield store
    store.close()
