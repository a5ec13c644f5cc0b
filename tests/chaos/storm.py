"""A storm: clients request images and videos while processes of the server are killed, one kind after another."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx2
from openai import APIError, OpenAI

from tests.chaos.victims import VICTIMS, lose
from tests.e2e.server import SHORT, SMALL, Server

PATIENCE_SECONDS = 300.0
"""A job that takes longer counts as hung."""

READY_SECONDS = 120.0
"""How long the server may take to recover."""

POLL_SECONDS = 1.0
"""Between two polls of a video, as in OpenAI's `create_and_poll`."""

SEEDS = 4
"""Different jobs of each kind, whose undisturbed outputs are known."""


@dataclass(frozen=True)
class Task:
    """What one client requests."""

    number: int
    kind: str
    """A key of `KINDS`: picture, streamed picture or clip."""
    seed: int


@dataclass
class Report:
    """The outcome of a storm."""

    jobs: int = 0
    lost: list[str] = field(default_factory=list)
    """Jobs that failed, with the reason."""
    wrong: list[str] = field(default_factory=list)
    """Jobs whose pixels differ from those of an undisturbed run."""
    hung: list[str] = field(default_factory=list)
    losses: list[tuple[str, float]] = field(default_factory=list)
    """The kind of each killed process, and the seconds until `/ready` said yes again."""

    @property
    def clean(self) -> bool:
        return not (self.lost or self.wrong or self.hung)


class Storm:
    """Seeded jobs of all kinds from `clients` clients, against a running server: at least `jobs`, and as many as it
    takes until a process of each kind was lost. A client waits up to `pause` seconds before each job."""

    def __init__(
        self,
        server: Server,
        *,
        seed: int,
        jobs: int,
        clients: int,
        pause: float = 0.0,
        victims: Sequence[str] = tuple(VICTIMS),
    ):
        self.server = server
        self.jobs = jobs
        self.clients = clients
        self.pause = pause
        self.victims = victims
        self.report = Report()
        self._seed = seed
        self._numbers = itertools.count()
        self._pictures: set[int] = set()
        """Numbers of those that are being made."""
        self._over = threading.Event()

    def run(self) -> Report:
        with self._client() as client:
            expected = {
                (kind, seed): KINDS[kind](client, Task(0, kind, seed)) for kind in KINDS for seed in range(SEEDS)
            }
        killing = threading.Thread(target=self._kill)
        killing.start()
        try:
            with ThreadPoolExecutor(self.clients) as pool:
                for client in [pool.submit(self._be_a_client, expected) for _ in range(self.clients)]:
                    client.result()
        finally:
            self._over.set()
            killing.join()
        return self.report

    def _be_a_client(self, expected: Mapping[tuple[str, int], bytes]) -> None:
        with self._client() as client:
            while (number := next(self._numbers)) < self.jobs or len(self.report.losses) < len(self.victims):
                chance = random.Random(f"{self._seed} {number}")
                time.sleep(chance.uniform(0, self.pause))
                self._check(client, Task(number, chance.choice(list(KINDS)), chance.randrange(SEEDS)), expected)

    def _check(self, client: OpenAI, task: Task, expected: Mapping[tuple[str, int], bytes]) -> None:
        started = time.monotonic()
        if task.kind != "clip":
            self._pictures.add(task.number)
        try:
            if KINDS[task.kind](client, task) != expected[task.kind, task.seed]:
                self.report.wrong.append(str(task))
        except Exception as error:
            self.report.lost.append(f"{task}: {error!r}")
        self._pictures.discard(task.number)
        if time.monotonic() - started > PATIENCE_SECONDS:
            self.report.hung.append(str(task))
        self.report.jobs += 1

    def _client(self) -> OpenAI:
        return OpenAI(
            base_url=f"{self.server.base_url}/v1",
            api_key="any",
            # Each kill may cost a request its connection: it survives twelve, with OpenAI's pauses of up to 8 s.
            max_retries=12,
            timeout=PATIENCE_SECONDS,
            http_client=httpx2.Client(transport=PatientTransport(), timeout=PATIENCE_SECONDS),
        )

    def _kill(self) -> None:
        """A picture is restarted once, so none may be struck twice, however slow the machine is."""
        turn = 0
        chance = random.Random(self._seed)
        while not self._over.wait(chance.uniform(1, 4)):
            kind = self.victims[turn % len(self.victims)]
            if lose(self.server, kind):
                turn += 1
                struck = set(self._pictures)
                self.report.losses.append((kind, self._seconds_to_ready()))
                while struck & self._pictures:
                    time.sleep(0.1)

    def _seconds_to_ready(self) -> float:
        """Poll until `/ready` says yes. After 0.2 s it may still do so: a hung rank is noticed late.

        The same client polls each time: creating one costs 40 ms of CPU, so ten a second would slow the recovery.
        """
        started = time.monotonic()
        time.sleep(0.2)
        while time.monotonic() - started < READY_SECONDS:
            try:
                if self.server.http.get("/ready", timeout=10).status_code == 200:
                    return time.monotonic() - started
            except httpx2.TransportError:
                pass
            time.sleep(0.1)
        self.report.hung.append("the server is not ready again")
        return READY_SECONDS


class PatientTransport(httpx2.HTTPTransport):
    """Turns the plain-text 404 of a new proxy, which has no routes yet, into a connection error, which is retried."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        if response.status_code == 404 and response.headers["content-type"] == "text/plain":
            response.close()
            raise httpx2.ConnectError("the proxy has no routes yet")
        return response


def _picture(client: OpenAI, task: Task) -> bytes:
    answer = client.images.generate(**_arguments(SMALL, task))
    return (answer.data or [])[0].b64_json.encode()  # type: ignore[union-attr]


def _streamed_picture(client: OpenAI, task: Task) -> bytes:
    """Request the stream again if it breaks off or ends in an error: by then the client no longer retries by itself."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            *_, last = client.images.generate(**_arguments(SMALL, task), stream=True)
            return last.b64_json.encode()
        except (httpx2.TransportError, APIError, ValueError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _clip(client: OpenAI, task: Task) -> bytes:
    """The key makes a retry after a lost response return the first attempt's video."""
    key = f"storm-{task.number}-{task.seed}-{time.monotonic_ns()}"
    video = client.videos.create(**_arguments(SHORT, task), extra_headers={"Idempotency-Key": key})
    while video.status not in ("completed", "failed"):
        time.sleep(POLL_SECONDS)
        video = client.videos.retrieve(video.id)
    if video.status == "failed":
        raise RuntimeError(f"{video.id} failed: {video.error}")
    return client.videos.download_content(video.id).content


def _arguments(fields: Mapping[str, Any], task: Task) -> dict[str, Any]:
    native = {name: fields[name] for name in ("prompt", "size")}
    extension = {name: value for name, value in fields.items() if name not in native}
    return {**native, "extra_body": {**extension, "seed": task.seed}}


KINDS = {"picture": _picture, "streamed picture": _streamed_picture, "clip": _clip}
