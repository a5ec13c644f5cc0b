"""A short storm over every kind of process. `make chaos` runs the long one."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.storm import Storm
from tests.chaos.victims import VICTIMS
from tests.e2e.server import running_server


def test_no_accepted_job_is_lost_none_is_wrong_and_no_client_hangs(tmp_path: Path) -> None:
    with running_server(tmp_path, "--num-gpus", "2", "--max-retries", "10") as server:
        report = Storm(server, seed=1, jobs=40, clients=8, pause=4.0).run()
    assert report.clean, report
    assert {kind for kind, _ in report.losses} == set(VICTIMS)
