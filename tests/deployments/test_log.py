"""The log's lines: ids to grep for, and nothing that a client wrote."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from configs.server_args import ServerArgs
from deployments import log
from tests.deployments.api.small_server import client, running_app

SECRETS = {"prompt": "a secret prompt", "key": "sk-secret", "path": "secret.png"}


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Logging is global to the process: restore it for the other tests."""
    loggers = [logging.getLogger(name) for name in log.LOGGERS]
    before = [(logger.level, logger.handlers, logger.propagate) for logger in loggers]
    yield
    for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
        logger.level, logger.handlers, logger.propagate = level, handlers, propagate


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], list[str]]]:
    """A function that configures the log with a server's arguments, and returns one that gives the lines."""

    def configure(**args: str) -> Callable[[], list[str]]:
        stream = io.StringIO()
        monkeypatch.setattr("sys.stderr", stream)
        log.configure(ServerArgs(**args), "engine")
        return lambda: stream.getvalue().splitlines()

    return configure


logger = logging.getLogger("deployments.anything")


def test_a_line_of_text_has_time_level_process_and_ids(lines: Callable) -> None:
    read = lines()
    logger.info("begun")
    with log.about("video_1"):
        logger.warning("%d steps left", 3)
    first, second = (line.split(" ", 1) for line in read())
    assert datetime.fromisoformat(first[0]).tzinfo is not None
    assert first[1] == "INFO engine - - begun"
    assert second[1] == "WARNING engine - video_1 3 steps left"


def test_a_line_of_json_has_the_same_by_name(lines: Callable) -> None:
    read = lines(log_format="json")
    logger.info("begun")
    with log.about("video_1"):
        logger.warning("%d steps — left\nand more", 3)
    first, second = map(json.loads, read())
    assert datetime.fromisoformat(first.pop("time")).tzinfo is not None
    assert first == {"level": "info", "process": "engine", "logger": "deployments.anything", "message": "begun"}
    assert (second["job_id"], second["message"]) == ("video_1", "3 steps — left\nand more")


def test_a_failure_is_one_line_of_json_with_its_traceback(lines: Callable) -> None:
    read = lines(log_format="json")
    try:
        raise RuntimeError("no memory")
    except RuntimeError:
        logger.exception("failed")
    (line,) = read()
    assert json.loads(line)["exception"].endswith("RuntimeError: no memory")


@pytest.mark.parametrize(("level", "number"), [("debug", 3), ("info", 2), ("error", 1)])
def test_the_level_is_the_servers(lines: Callable, level: str, number: int) -> None:
    read = lines(log_level=level)
    for say in (logger.debug, logger.info, logger.error):
        say("message")
    assert len(read()) == number


async def test_a_task_is_about_the_job_it_was_started_for(lines: Callable) -> None:
    read = lines()

    async def work() -> None:
        await asyncio.sleep(0.01)
        logger.info("done")

    tasks = []
    for name in ("video_1", "video_2"):
        with log.about(name):
            tasks.append(asyncio.create_task(work()))
    await asyncio.gather(*tasks)
    logger.info("all done")
    assert [line.split()[4] for line in read()] == ["video_1", "video_2", "-"]


async def test_a_request_is_one_line_by_its_route_with_its_own_id_and_its_jobs(lines: Callable, tmp_path: Path) -> None:
    read = lines(log_format="json")
    bearer = {"authorization": f"Bearer {SECRETS['key']}"}
    async with running_app(tmp_path, api_key=SECRETS["key"]) as (app, state), client(app) as http:
        created = await http.post(
            "/v1/videos", json={"prompt": SECRETS["prompt"]}, headers={**bearer, "x-request-id": "req-of-mine"}
        )
        video = created.json()["id"]
        while not (await state.get_video(video)).finished:
            await asyncio.sleep(0.01)
        await http.get(f"/v1/videos/{SECRETS['path']}", headers=bearer)
        await http.get(f"/{SECRETS['path']}")
        await http.get("/v1/models", headers={"authorization": "Bearer sk-secret-too"})
        await http.get("/health")
    found = [json.loads(line) for line in read()]
    answers = [line["message"].rpartition(" in ")[0] for line in found if " in " in line["message"]]
    assert answers == [
        "POST /v1/videos 200",
        "GET /v1/videos/{video_id} 404",
        "GET an unknown route 404",
        "GET /v1/models 401",
    ]
    of_the_job = [line for line in found if line.get("job_id") == video]
    assert {"queued", "POST /v1/videos 200"} <= {line["message"].partition(" in ")[0] for line in of_the_job}
    assert "req-of-mine" in {line.get("request_id") for line in of_the_job}
    for secret in SECRETS.values():
        assert not [line for line in read() if secret in line]
