"""A real server: the `ditserve` command in its own process, on a free port, with state in its own folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx2
import psutil
from openai import AsyncOpenAI, OpenAI

from deployments.command.cluster import free_ports

START_SECONDS = 180.0
"""How long a start may take on a loaded machine; on an idle one it takes 10 to 20 s."""

ANSWER_SECONDS = 300.0
"""How long one request may take."""

FLOAT32 = ("--dtype", "fp32")
"""Flags of servers whose pixels are compared, on one rank and on four: bfloat16, the default on CPUs with AMX, rounds
differently for different shapes."""

STANDS_BY = re.compile(r"forked (\d+)")
"""Name of a process that stands by for its fork, with the fork's id."""

MARK = "DITSERVE_TEST_SERVER"
"""Environment variable that marks a server's processes, even when their parents are gone."""

SMALL: Mapping[str, Any] = {"prompt": "a calico cat", "size": "64x64", "num_inference_steps": 2}
"""A request that a CPU computes in a moment."""

SHORT: Mapping[str, Any] = {**SMALL, "num_frames": 5}
"""The same for a video."""


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def base_url(self) -> str:
        """Without the `/v1` that OpenAI's client wants."""
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def http(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.base_url, timeout=ANSWER_SECONDS)

    def openai(self, *, strict: bool = True) -> OpenAI:
        """OpenAI's client; a strict one raises for every response that its models do not allow."""
        return OpenAI(**self._openai_settings, _strict_response_validation=strict)

    def async_openai(self) -> AsyncOpenAI:
        return AsyncOpenAI(**self._openai_settings, _strict_response_validation=True)

    @property
    def _openai_settings(self) -> dict[str, Any]:
        return {"base_url": f"{self.base_url}/v1", "api_key": "any", "max_retries": 0, "timeout": ANSWER_SECONDS}

    def picture(self, **fields: Any) -> bytes:
        """Make a small image; return the bytes of its PNG."""
        answer = self.http.post("/v1/images/generations", json={**SMALL, **fields})
        assert answer.status_code == 200, answer.text
        return b64decode(answer.json()["data"][0]["b64_json"])

    def create_video(self, **fields: Any) -> dict[str, Any]:
        """Start a short video; return its object."""
        answer = self.http.post("/v1/videos", json={**SHORT, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def video(self, video_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/videos/{video_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait_for_video(self, video_id: str, until: Callable[[dict[str, Any]], bool] | None = None) -> dict[str, Any]:
        """The video's object once `until` is true of it or, without `until`, once it is completed or failed."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            video = self.video(video_id)
            ended = video["status"] in ("completed", "failed")
            if until(video) if until else ended:
                return video
            assert not ended, video
            # A poll costs the server's processes some 10 ms of CPU: one every 5 ms doubled a short video's time.
            time.sleep(0.05)
        raise TimeoutError(video)

    def clip(self, **fields: Any) -> bytes:
        """Make a short video; return the bytes of its MP4."""
        video = self.wait_for_video(self.create_video(**fields)["id"])
        assert video["status"] == "completed", video
        answer = self.http.get(f"/v1/videos/{video['id']}/content")
        assert answer.status_code == 200, answer.text
        return answer.content

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Every living process of the server, including itself, whose title starts with `title`."""
        return marked_processes(str(self.port), title)

    def ranks(self) -> list[psutil.Process]:
        """All ranks, rank 0 (the leader) first: they are spawned one after the other."""
        return sorted(self.processes("ray::Rank"), key=lambda process: process.create_time())

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Send a signal to the server's process group, as terminals and supervisors do, and return the exit status."""
        os.killpg(self.process.pid, signal_number)
        return self.process.wait(60)


def marked_processes(mark: str, title: str = "") -> list[psutil.Process]:
    """Every living process with this `MARK` in its environment, whose title starts with `title`.

    One that stands by for a fork is left out, and the fork is there: see `tests/warm_workers`. Their `info` dates from
    the listing: any of them may end at any moment.
    """
    listed = {process.pid: process for process in psutil.process_iter(["cmdline", "environ", "name"])}
    marked = [
        process
        for process in listed.values()
        if (process.info["environ"] or {}).get(MARK) == mark  # a dead process has an empty one, or none
    ]
    actual = [
        listed.get(int(fork[1])) if (fork := STANDS_BY.fullmatch(process.info["name"] or "")) else process
        for process in marked
    ]
    return [
        process
        for process in actual
        if process is not None and " ".join(process.info["cmdline"] or ()).startswith(title)
    ]


def says_ready(server: Server) -> bool:
    return "ditserve is ready" in server.log.read_text()


@contextmanager
def running_server(folder: Path, *flags: str) -> Iterator[Server]:
    """Start `ditserve serve` with `flags`, wait for its ready line, and stop it with Ctrl-C; it must exit with 0.

    A second server on the same folder continues with the state of the first. Neither needs a home folder.
    """
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "deployments.command.cli", "serve", "--port", str(port)]
    command += ["--output-path", str(folder / "outputs"), "--state-path", str(folder / "jobs.sqlite3"), *flags]
    home = {"HOME": os.devnull}
    with running(command, port, folder, says_ready, environment=home) as server:
        yield server
        if server.process.poll() is None:
            assert server.stop(signal.SIGINT) == 0, server.log.read_text()


@contextmanager
def running(
    command: Sequence[str],
    port: int,
    folder: Path,
    is_ready: Callable[[Server], bool],
    *,
    working_folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run `command`, a server on `port` that logs to `folder`; yield it once it is ready, and end it with SIGTERM."""
    log = folder / f"server-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=working_folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
            env={
                **{name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"},
                "HF_HUB_OFFLINE": "1",
                MARK: str(port),
                **(environment or {}),
            },
        )
    server = Server(process, port, log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(server):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start (status {process.poll()}):\n{log.read_text()}")
            time.sleep(0.1)
        yield server
    finally:
        try:
            if process.poll() is None:
                server.stop()
        finally:
            for left in server.processes():
                with suppress(psutil.NoSuchProcess):
                    left.kill()
