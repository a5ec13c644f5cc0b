"""A cluster of two nodes, each its own host with room for one rank: the gang has to span both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests import tiny_models
from tests.e2e.hosts import Host, can_be_made, hosts
from tests.e2e.server import ANSWER_SECONDS, MARK, SHORT, SMALL, START_SECONDS, marked_processes, running, says_ready

RAY_PORT = 6379
NODES_OWN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's processes that stay as long as the node."""

PORT = 30000
"""Each host has its own ports: no other test can take them."""


def environment(host: Host) -> dict[str, str]:
    """The environment of what is started on `host`."""
    # Its workers are no forks of a warm process, which is on another host.
    inherited = {name: value for name, value in os.environ.items() if name != "WARM_WORKERS"}
    return {**inherited, "RAY_AUTH_MODE": "disabled", MARK: host.address}


@contextmanager
def ray_node(host: Host, folder: Path, *flags: str) -> Iterator[None]:
    """A Ray node on `host`; at the end, all its processes are killed at once, as when a machine is lost."""
    log = folder / f"node-{host.address}.log"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--node-ip-address", host.address]
    command += ["--num-cpus", "1", "--disable-usage-stats", "--block", *flags]
    with log.open("ab") as output:
        node = subprocess.Popen(host.command(*command), stdout=output, stderr=output, env=environment(host))
    try:
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in log.read_text():
            if node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the node did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield
    finally:
        log.unlink()
        for process in processes(host):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()


def processes(host: Host, title: str = "") -> list[psutil.Process]:
    """Ray's processes on `host` whose title starts with `title`."""
    return marked_processes(host.address, title)


def ranks(host: Host) -> int:
    return len(processes(host, "ray::Rank"))


def url(host: Host, path: str) -> str:
    return f"http://{host.address}:{PORT}{path}"


def picture(host: Host) -> bytes:
    status, answer = host.request("POST", url(host, "/v1/images/generations"), {**SMALL, "seed": 5})
    assert status == 200, answer
    return b64decode(json.loads(answer)["data"][0]["b64_json"])


def create_video(host: Host) -> str:
    body = {**SHORT, "seed": 5, "num_inference_steps": 40}
    status, answer = host.request("POST", url(host, "/v1/videos"), body)
    assert status == 200, answer
    return json.loads(answer)["id"]


def wait_for(host: Host, path: str, field: str, value: str) -> None:
    deadline = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < deadline:
        status, answer = host.request("GET", url(host, path))
        if status == 200 and json.loads(answer)[field] == value:
            return
        time.sleep(0.2)
    raise TimeoutError(answer)


def first_answer(host: Host, path: str) -> int:
    """The status of the first response: a connection that led to the lost node is cut without one."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < deadline:
        status, _ = host.request("GET", url(host, path))
        if status != 0:
            return status
    raise TimeoutError(path)


def content(host: Host, video_id: str) -> bytes:
    status, answer = host.request("GET", url(host, f"/v1/videos/{video_id}/content"))
    assert status == 200, answer
    return answer


def start_another(host: Host, cluster: str) -> subprocess.CompletedProcess[str]:
    """Start a second server on the same cluster, which would replace the first."""
    command = [sys.executable, "-m", "deployments.command.cli", "serve", "--port", str(PORT + 1)]
    joining = {**environment(host), "RAY_ADDRESS": cluster}
    return subprocess.run(host.command(*command), env=joining, capture_output=True, text=True, timeout=START_SECONDS)


@pytest.mark.skipif(not can_be_made(), reason="this machine does not let its users make network namespaces")
def test_a_gang_spans_two_nodes_and_survives_the_loss_of_one_once_there_is_another(tmp_path: Path) -> None:
    head_flags = ("--head", "--port", str(RAY_PORT), "--include-dashboard", "false")
    command = [sys.executable, "-m", "deployments.command.cli", "serve", "--host", "0.0.0.0", "--port", str(PORT)]
    command += [
        "--model-path",
        str(tiny_models.save("wan2.1-t2v", tmp_path)),
        "--num-gpus",
        "2",
        "--num-cpus-per-rank",
        "0.6",
        "--max-retries",
        "5",
    ]
    command += ["--output-path", str(tmp_path / "outputs"), "--state-path", str(tmp_path / "jobs.sqlite3")]
    with hosts(2) as (first, second), ray_node(first, tmp_path, *head_flags), ExitStack() as workers:
        cluster = f"{first.address}:{RAY_PORT}"
        to_be_lost = workers.enter_context(ExitStack())
        to_be_lost.enter_context(ray_node(second, tmp_path, "--address", cluster))
        with running(
            first.command(*command),
            PORT,
            tmp_path,
            says_ready,
            environment={"RAY_ADDRESS": cluster, "RAY_AUTH_MODE": "disabled"},
        ):
            assert (ranks(first), ranks(second)) == (1, 1)
            refused = start_another(second, cluster)
            assert refused.returncode == 1
            assert "Serve runs on this cluster already" in refused.stderr

            assert picture(first) == picture(second)
            undisturbed = create_video(first)
            wait_for(second, f"/v1/videos/{undisturbed}", "status", "completed")
            expected = content(second, undisturbed)
            assert content(first, undisturbed) == expected

            disturbed = create_video(second)
            wait_for(second, f"/v1/videos/{disturbed}", "status", "in_progress")
            to_be_lost.close()
            assert ranks(second) == 0
            assert first_answer(first, "/ready") == 503

            workers.enter_context(ray_node(second, tmp_path, "--address", cluster))
            wait_for(first, f"/v1/videos/{disturbed}", "status", "completed")
            wait_for(second, "/ready", "status", "ready")
            assert (ranks(first), ranks(second)) == (1, 1)
            assert content(first, disturbed) == content(second, disturbed) == expected
        assert [process for process in processes(first, "ray::") if process.name() not in NODES_OWN] == []
