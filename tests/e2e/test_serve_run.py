"""`serve run serve_config.yaml` gives the server that the command line gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import yaml

from deployments.cluster import private_proxy_environment
from tests.e2e.server import START_SECONDS, free_port

pytestmark = pytest.mark.e2e

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Not pytest's: HAProxy's sockets go here, and the path of a socket has at most 97 characters.
    with tempfile.TemporaryDirectory(prefix="ditserve-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def base_url(folder: Path) -> Iterator[str]:
    """The file as it is, but for its ports, which other tests may be using."""
    config = yaml.safe_load(CONFIG.read_text())
    port = config["http_options"]["port"] = free_port()
    config["controller_options"]["runtime_env"]["env_vars"] = private_proxy_environment(str(folder))
    (folder / "serve_config.yaml").write_text(yaml.safe_dump(config))
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("serve"), "run", "serve_config.yaml"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CONFIG.parent)},
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/ready", timeout=10).status_code == 200
    except httpx2.TransportError:
        return False


def test_it_makes_pictures(base_url: str) -> None:
    body = {"prompt": "A calico cat", "size": "64x64", "num_inference_steps": 1}
    answer = httpx2.post(f"{base_url}/v1/images/generations", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["size"] == "64x64"


def test_it_keeps_its_state_where_it_was_started(base_url: str, folder: Path) -> None:
    body = {"prompt": "A calico cat", "size": "64x64", "num_inference_steps": 1, "num_frames": 1}
    video = httpx2.post(f"{base_url}/v1/videos", json=body, timeout=120).json()
    assert httpx2.get(f"{base_url}/v1/videos/{video['id']}", timeout=60).status_code == 200
    assert (folder / "outputs" / "jobs.sqlite3").is_file()
