from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.state.records import Records


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "state" / "jobs.sqlite3")


@pytest.fixture
def records(path: str) -> Iterator[Records]:
    records = Records(path)
    yield records
    records.close()
