"""A real server: the installed command in a process of its own, on a free port, with state in a folder of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 180.0
"""Patience with a start on a loaded machine; a start in quiet takes 10 to 20 s."""


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def base_url(self) -> str:
        """Without the `/v1` that OpenAI's client wants."""
        return f"http://127.0.0.1:{self.port}"

    def stop(self, signal_number: int = signal.SIGTERM, seconds: float = 60.0) -> int:
        """Send a signal and give the exit status."""
        self.process.send_signal(signal_number)
        return self.process.wait(seconds)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running_server(folder: Path, *flags: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Start `ditserve serve` with `flags`, wait for its ready line, and end it with SIGTERM."""
    port = free_port()
    log = folder / f"server-{port}.log"
    command = [sys.executable, "-m", "deployments.cli", "serve", "--port", str(port)]
    command += ["--output-path", str(folder / "outputs"), "--state-path", str(folder / "jobs.sqlite3"), *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", **(environment or {})},
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while "ditserve is ready" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start (status {process.poll()}):\n{log.read_text()}")
            time.sleep(0.1)
        yield Server(process, port, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
