"""`serve run serve_config.yaml` gives the server that the command line gives."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest
import yaml

from deployments.cluster import private_proxy_environment
from tests.e2e.pictures import decoded_frames, opened
from tests.e2e.server import SHORT, Server, free_port, running

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Not pytest's: sockets go here, and the path of a socket has at most 107 characters, of HAProxy's 97.
    with tempfile.TemporaryDirectory(prefix="ditserve-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def deployed(folder: Path) -> Iterator[Server]:
    """The file as it is, but for its ports, which other tests may be using. It ends with everything it started."""
    config = yaml.safe_load(CONFIG.read_text())
    port = config["http_options"]["port"] = free_port()
    config["controller_options"]["runtime_env"]["env_vars"] = private_proxy_environment(str(folder))
    (folder / "serve_config.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", "serve_config.yaml"]
    # Ray looks for a running cluster in its folder for temporary files, and is not to find one.
    environment = {"PYTHONPATH": str(CONFIG.parent), "RAY_TMPDIR": str(folder)}
    with running(command, port, folder, is_ready, working_folder=folder, environment=environment) as server:
        yield server
        processes = server.processes()
        assert len(processes) > 5
        server.stop()
        psutil.wait_procs(processes, timeout=10)
        assert server.processes() == []


def is_ready(server: Server) -> bool:
    try:
        return httpx2.get(f"{server.base_url}/ready", timeout=10).status_code == 200
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


def test_it_keeps_its_state_where_it_was_started(deployed: Server, folder: Path) -> None:
    deployed.create_video()
    assert (folder / "outputs" / "jobs.sqlite3").is_file()
