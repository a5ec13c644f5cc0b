"""The end of a server, and its next start."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from deployments.interfaces import VideoStatus
from deployments.state.records import Records
from tests import tiny_models
from tests.e2e.server import Server, running_server

STOP_SECONDS = 10.0

PULSE_SECONDS = 0.03
"""How long a rank that stands still computes at a time: some steps of a hundred."""


@dataclass(frozen=True)
class Work:
    """The videos that a server had when it ended, and what they must be under the next one."""

    finished: dict[str, Any]
    running: str
    queued: str
    contents: Mapping[str, bytes]
    """By id, of all three."""


def leave_work(server: Server) -> Work:
    """A finished video, a running one and a queued one. The rank stands still, so that they stay what they are."""
    long = {"seed": 1, "num_inference_steps": 100}
    expected = server.clip(**long)
    finished = server.wait_for_video(server.create_video(seed=2)["id"])
    clip = server.http.get(f"/v1/videos/{finished['id']}/content").content
    (rank,) = server.ranks()
    rank.suspend()
    running = server.create_video(**long)["id"]
    queued = server.create_video(seed=2)["id"]
    while server.video(running)["progress"] < 5:
        rank.resume()
        time.sleep(PULSE_SECONDS)
        rank.suspend()
        time.sleep(10 * PULSE_SECONDS)  # what it has reported arrives
    assert server.video(running)["status"] == "in_progress"
    assert server.video(queued)["status"] == "queued"
    return Work(finished, running, queued, {finished["id"]: clip, running: expected, queued: clip})


def assert_done(server: Server, work: Work) -> None:
    assert server.video(work.finished["id"]) == work.finished
    assert server.video(work.running)["status"] in ("in_progress", "completed")
    for video_id, content in work.contents.items():
        assert server.wait_for_video(video_id)["status"] == "completed"
        assert server.http.get(f"/v1/videos/{video_id}/content").content == content
    listed = [video["id"] for video in server.http.get("/v1/videos").json()["data"]]
    assert listed[:3] == [work.queued, work.running, work.finished["id"]]


def assert_ends(server: Server, signal_number: int) -> None:
    processes = server.processes()
    assert len(processes) > 5
    started = time.monotonic()
    status = server.stop(signal_number)
    assert time.monotonic() - started < STOP_SECONDS
    assert status == 0, server.log.read_text()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.resume()  # one that stands still cannot end
    psutil.wait_procs(processes, timeout=STOP_SECONDS)
    assert server.processes() == []


def kill_all(server: Server) -> None:
    processes = server.processes()
    assert len(processes) > 5
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=STOP_SECONDS)
    assert server.processes() == []


def test_a_server_that_was_stopped_or_killed_leaves_its_videos_to_the_next(tmp_path: Path) -> None:
    model = ("--model-path", str(tiny_models.save("wan2.1-t2v", tmp_path)))
    with running_server(tmp_path, *model) as first:
        killed = leave_work(first)
        kill_all(first)
    with running_server(tmp_path, *model) as second:
        assert_done(second, killed)
        stopped = leave_work(second)
        assert_ends(second, signal.SIGTERM)
    with closing(Records(str(tmp_path / "jobs.sqlite3"))) as records:
        assert [video.job.id for video in records.videos.unfinished()] == [stopped.running, stopped.queued]
        assert records.videos.get(stopped.finished["id"]).status is VideoStatus.COMPLETED


def test_a_started_server_has_said_one_line(server: Server) -> None:
    assert server.log.read_text().splitlines() == [
        f"ditserve is ready on 1 CPU rank: {server.base_url}/v1 (API page: /docs)"
    ]


def test_no_process_of_rays_runs_that_a_server_has_no_use_for(server: Server) -> None:
    commands = [" ".join(process.info["cmdline"]) for process in server.processes()]
    assert any("gcs_server" in command for command in commands)
    unused = ("dashboard.py", "log_monitor.py", "monitor.py")
    assert [command for command in commands if any(f"/{name}" in command for name in unused)] == []
