"""Failures of the server itself, which no healthy engine shows: the app over an engine that fails on demand."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager

import httpx2
import pytest

from deployments import log
from deployments.api import event_stream
from deployments.errors import APIError
from pipelines.job import Event, InvalidJob, Job, Media, Progress, Task
from tests.deployments.api.stand_in import StandInEngine, client_of


class FailingEngine(StandInEngine):
    """Yields some steps, then raises."""

    def __init__(self, failure: Exception, steps: int = 0):
        super().__init__(Task.TEXT_TO_IMAGE)
        self._failure = failure
        self._steps = steps

    async def ready(self) -> None:
        raise self._failure

    async def generate(self, job: Job, media: Media, *, progress: bool) -> AsyncGenerator[Event, None]:
        for step in range(self._steps):
            yield Progress(step + 1, 10)
        raise self._failure


def client(failure: Exception, steps: int = 0) -> AbstractAsyncContextManager[httpx2.AsyncClient]:
    return client_of(FailingEngine(failure, steps))


FULL = APIError(429, "The queue is full", code="queue_full", headers={"Retry-After": "7"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (FULL, 429, "rate_limit_error"),
        (APIError(503, "still loading", code="not_ready"), 503, "server_error"),
        (InvalidJob("too wide for this model", "size"), 400, "invalid_request_error"),
        (RuntimeError("secret /path"), 500, "server_error"),
    ],
)
async def test_a_failure_before_the_first_step_has_its_own_status(
    failure: Exception, status: int, kind: str, stream: bool
) -> None:
    async with client(failure) as http:
        answer = await http.post("/v1/images/generations", json={"prompt": "p", "stream": stream})
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == kind
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"]
    assert answer.headers.get("retry-after") == {429: "7", 503: "5"}.get(status)


async def test_an_unexpected_failure_is_logged_under_the_id_the_client_gets(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.setFormatter(log.TextFormatter("ingress"))
    async with client(RuntimeError("the reason")) as http:
        with caplog.at_level(logging.ERROR):
            answer = await http.post("/v1/images/generations", json={"prompt": "p"}, headers={"x-request-id": "mine"})
    assert "mine" in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert " ERROR ingress mine img_" in caplog.text
    assert "the reason" in caplog.text


@pytest.mark.parametrize(
    ("failure", "code"),
    [(APIError(503, "a worker died", code="gang_broken"), "gang_broken"), (RuntimeError("secret"), "internal_error")],
)
async def test_a_failure_amid_a_stream_is_its_last_event(failure: Exception, code: str) -> None:
    async with client(failure, steps=2) as http:
        answer = await http.post("/v1/images/generations", json={"prompt": "p", "stream": True})
    assert answer.status_code == 200
    *_, last, end = answer.text.split("\n\n")
    assert end == ""
    assert last.startswith('event: error\ndata: {"type":"error","error":{"message":')
    assert f'"code":"{code}"' in last
    assert "secret" not in answer.text


@pytest.mark.parametrize(("status", "again"), [(409, False), (429, True), (500, False), (503, True), (504, False)])
async def test_clients_are_told_what_not_to_repeat(status: int, again: bool) -> None:
    async with client(APIError(status, "as told")) as http:
        answer = await http.post("/v1/images/generations", json={"prompt": "p"})
    assert answer.headers.get("x-should-retry") == (None if again else "false")


async def test_a_stream_is_not_silent_while_its_job_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowEngine(FailingEngine):
        async def generate(self, job: Job, media: Media, *, progress: bool) -> AsyncGenerator[Event, None]:
            await asyncio.sleep(0.1)
            yield Progress(0, 1)
            await asyncio.sleep(0.1)
            raise self._failure

    monkeypatch.setattr(event_stream, "SILENCE_SECONDS", 0.04)
    async with client_of(SlowEngine(APIError(500, "too bad"))) as http:
        answer = await http.post("/v1/images/generations", json={"prompt": "p", "stream": True})
    *comments, error, end = answer.text.split("\n\n")
    assert comments == [": waiting", ": waiting", ": step 0 of 1", ": waiting", ": waiting"]
    assert (error[:12], end) == ("event: error", "")


async def test_readiness_says_what_is_wrong_while_the_server_is_alive() -> None:
    async with client(APIError(503, "rank 2 does not answer", code="not_ready")) as http:
        assert (await http.get("/health")).status_code == 200
        answer = await http.get("/ready")
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "rank 2 does not answer"


@pytest.mark.parametrize("strange", ["a b", "x" * 129, "<script>"])
async def test_a_request_id_that_does_not_belong_into_a_log_is_replaced(strange: str) -> None:
    async with client(RuntimeError()) as http:
        answer = await http.post("/v1/images/generations", json={"prompt": "p"}, headers={"x-request-id": strange})
    assert strange not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
