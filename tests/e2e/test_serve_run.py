"""`serve run serve_config.yaml` starts the same server as the command line."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import httpx2
import psutil
import pytest
import yaml

from deployments.command.cluster import free_ports, private_proxy_environment
from tests.e2e.pictures import decoded_frames, opened
from tests.e2e.server import SHORT, Server, running

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"
ENGINE = "ray::ServeReplica:ditserve:Engine"

AUTOSCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 2,
    "look_back_period_s": 2,
    "metrics_interval_s": 1,
    "upscale_delay_s": 1,
    "downscale_delay_s": 2,
}


@pytest.fixture(scope="module")
def deployed() -> Iterator[Server]:
    """The file as it is, except for its ports, which other tests may be using, float32, in which the other server
    computes, and an Engine that scales with its load, quickly. On SIGTERM it ends with everything it started."""
    # Not pytest's folder: sockets go here, and a socket's path has at most 107 characters, HAProxy's at most 97.
    with tempfile.TemporaryDirectory(prefix="ditserve-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config = yaml.safe_load(CONFIG.read_text())
        (port,) = free_ports(1)
        config["http_options"]["port"] = port
        config["controller_options"]["runtime_env"]["env_vars"] = private_proxy_environment(name)
        (application,) = config["applications"]
        application["args"]["dtype"] = "fp32"
        (engine,) = (each for each in application["deployments"] if each["name"] == "Engine")
        engine.update(num_replicas="auto", autoscaling_config=AUTOSCALING)
        (folder / "serve_config.yaml").write_text(yaml.safe_dump(config))
        command = [str(Path(sys.executable).with_name("serve")), "run", "serve_config.yaml"]
        # Ray looks for a running cluster in its folder for temporary files, and must not find one.
        modules = os.pathsep.join((str(CONFIG.parent), os.environ["PYTHONPATH"]))
        environment = {"PYTHONPATH": modules, "RAY_TMPDIR": name, "RAY_AUTH_MODE": "disabled"}
        with running(command, port, folder, is_ready, working_folder=folder, environment=environment) as server:
            yield server
            processes = server.processes()
            assert len(processes) > 5
            server.process.terminate()  # not the group: see docs/deploy.md
            server.process.wait(60)
            psutil.wait_procs(processes, timeout=10)
            assert server.processes() == []


def is_ready(server: Server) -> bool:
    try:
        return server.http.get("/ready", timeout=10).status_code == 200
    except httpx2.TransportError:
        return False


def test_it_is_the_server_that_the_command_line_gives(deployed: Server, server: Server) -> None:
    (deployed_model,), (served_model,) = (each.http.get("/v1/models").json()["data"] for each in (deployed, server))
    assert {**deployed_model, "created": 0} == {**served_model, "created": 0}
    assert deployed.http.get("/openapi.json").json() == server.http.get("/openapi.json").json()
    assert deployed.picture(seed=3) == server.picture(seed=3)


def test_it_makes_pictures_and_videos(deployed: Server) -> None:
    assert opened(deployed.picture()).size == (64, 64)
    assert len(decoded_frames(deployed.clip())) == SHORT["num_frames"]


def test_it_keeps_its_state_where_it_was_started(deployed: Server) -> None:
    deployed.create_video()
    assert (deployed.log.parent / "outputs" / "jobs.sqlite3").is_file()


def test_serve_adds_engine_replicas_as_the_queue_demands_and_takes_them_away(deployed: Server) -> None:
    expected = deployed.picture(seed=3)
    assert len(deployed.processes(ENGINE)) == 1
    enough = Event()
    with ThreadPoolExecutor(8) as clients:
        asking = [clients.submit(keep_asking, deployed, enough) for _ in range(8)]
        try:
            wait_until(lambda: len(deployed.http.get("/v1/list_loras").json()["replicas"]) == 2)
        finally:
            enough.set()
        assert set().union(*(client.result() for client in asking)) == {expected}
    wait_until(lambda: len(deployed.processes(ENGINE)) == 1)
    assert deployed.picture(seed=3) == expected


def keep_asking(server: Server, enough: Event) -> set[bytes]:
    pictures = set()
    while not enough.is_set():
        pictures.add(server.picture(seed=3))
    return pictures


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.5)
