"""The server's log: lines from any of its processes, as text or JSON, each with the ids to find it by.

A request has an id from its arrival at the ingress until its response. It starts a job, whose id goes further, to the
state actor, the engine and the ranks; the ingress logs both ids. No line has a client's prompt, key or file name: lines
say what happened, by ids. The reason why an adapter could not be used names its path.

Lines go to stderr, which Ray keeps for each process in the `logs` folder of its session.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from configs.server_args import ServerArgs

LOGGERS = ("deployments", "pipelines", "lora")
"""Ours. Ray's own loggers are left alone."""

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""Id of the HTTP request that the current task answers: sent as `x-request-id`."""

job_id: ContextVar[str] = ContextVar("job_id", default="-")
"""Id of the job that the current task works for."""


@contextmanager
def about(job: str) -> Iterator[None]:
    """Attribute to this job what is logged within, also by tasks started within."""
    token = job_id.set(job)
    try:
        yield
    finally:
        job_id.reset(token)


def configure(args: ServerArgs, process: str) -> None:
    """Log from this process as `args` say. `process` names it in each line: `ingress`, `rank 3`."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter(process) if args.log_format == "json" else TextFormatter(process))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(args.log_level.upper())
        logger.handlers = [handler]
        logger.propagate = False


class TextFormatter(logging.Formatter):
    """`2026-03-01T12:00:00.123+00:00 INFO engine req_1 video_2 message`, with a dash for a missing id."""

    def __init__(self, process: str):
        super().__init__()
        self._process = process

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        ids = f"{request_id.get()} {job_id.get()}"
        return f"{_time(record)} {record.levelname} {self._process} {ids} {record.message}"


class JSONFormatter(logging.Formatter):
    """One JSON object per line; a missing id is left out."""

    def __init__(self, process: str):
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for variable in (request_id, job_id):
            if variable.get() != "-":
                line[variable.name] = variable.get()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
