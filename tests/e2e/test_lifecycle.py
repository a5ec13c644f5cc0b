"""The end of a server, and its next beginning."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil

from tests.e2e.server import Server, running_server

STOP_SECONDS = 10.0


def assert_ends(server: Server, signal_number: int) -> None:
    processes = server.processes()
    assert len(processes) > 5
    started = time.monotonic()
    status = server.stop(signal_number)
    assert time.monotonic() - started < STOP_SECONDS
    assert status == 0, server.log.read_text()
    psutil.wait_procs(processes, timeout=STOP_SECONDS)
    assert server.processes() == []


def test_a_stopped_server_leaves_nothing_behind_and_the_next_finishes_its_videos(tmp_path: Path) -> None:
    with running_server(tmp_path) as first:
        expected = first.clip(seed=1, num_inference_steps=100)
        finished = first.wait_for_video(first.create_video(seed=2)["id"])
        clip = first.http.get(f"/v1/videos/{finished['id']}/content").content
        interrupted = first.create_video(seed=1, num_inference_steps=100)
        queued = first.create_video(seed=2)
        first.wait_for_video(interrupted["id"], until=lambda video: video["progress"] >= 5)
        assert first.video(queued["id"])["status"] == "queued"
        assert_ends(first, signal.SIGINT)

    with running_server(tmp_path) as second:
        assert second.video(finished["id"]) == finished
        assert second.http.get(f"/v1/videos/{finished['id']}/content").content == clip
        assert second.video(interrupted["id"])["status"] in ("in_progress", "completed")
        for video, content in ((interrupted, expected), (queued, clip)):
            assert second.wait_for_video(video["id"])["status"] == "completed"
            assert second.http.get(f"/v1/videos/{video['id']}/content").content == content
        listed = [video["id"] for video in second.http.get("/v1/videos").json()["data"]]
        assert listed[:3] == [queued["id"], interrupted["id"], finished["id"]]
        assert_ends(second, signal.SIGTERM)


def test_no_process_of_rays_runs_that_a_server_has_no_use_for(server: Server) -> None:
    commands = [" ".join(process.cmdline()) for process in server.processes()]
    assert any("gcs_server" in command for command in commands)
    unused = ("dashboard.py", "log_monitor.py", "monitor.py")
    assert [command for command in commands if any(f"/{name}" in command for name in unused)] == []
