"""A server that asks for keys, keeps videos for seconds and logs JSON: what its clients and its operator see."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from openai import AuthenticationError, NotFoundError, OpenAI, PermissionDeniedError

from tests.e2e.server import ANSWER_SECONDS, SHORT, Server, running_server

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

ALICE, BOB, ADMIN = "sk-alice-4f1c", "sk-bob-77aa", "sk-admin-90d2"
"""The first is passed in a file, the others as flags."""

TTL_SECONDS = 4

VIDEO: dict[str, Any] = {
    "prompt": "a prompt of Alice's own",
    "size": SHORT["size"],
    "extra_body": {"num_inference_steps": 2, "num_frames": 5},
}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text(f"{ALICE}\n")
    flags = ["--api-key-file", str(folder / "keys"), "--api-key", BOB, "--admin-api-key", ADMIN]
    with running_server(folder, *flags, "--video-ttl", str(TTL_SECONDS), "--log-format", "json") as server:
        yield server


def client_of(server: Server, key: str) -> OpenAI:
    return OpenAI(base_url=f"{server.base_url}/v1", api_key=key, max_retries=0, timeout=ANSWER_SECONDS)


def test_a_wrong_key_is_openais_authentication_error(guarded: Server) -> None:
    client = client_of(guarded, "sk-wrong")
    for call in (
        client.models.list,
        lambda: client.images.generate(prompt="p"),
        lambda: client.images.edit(prompt="p", image=b"p"),
        lambda: client.videos.create(**VIDEO),
        client.videos.list,
        lambda: client.videos.download_content("video_1"),
    ):
        with pytest.raises(AuthenticationError, match="Incorrect API key provided") as raised:
            call()
        assert raised.value.code == "invalid_api_key"
        assert raised.value.request_id


def test_probes_need_no_key(guarded: Server) -> None:
    for path in ("/health", "/ready", "/docs", "/openapi.json"):
        assert guarded.http.get(path).status_code == 200


def test_the_lora_routes_are_the_admins(guarded: Server) -> None:
    with pytest.raises(PermissionDeniedError):
        client_of(guarded, ALICE).get("/list_loras", cast_to=object)
    assert client_of(guarded, ADMIN).get("/list_loras", cast_to=object)


def test_a_video_is_its_keys_alone_and_goes_when_its_time_is_over(guarded: Server) -> None:
    alice, bob, admin = (client_of(guarded, key) for key in (ALICE, BOB, ADMIN))
    video = alice.videos.create_and_poll(**VIDEO, poll_interval_ms=100)
    assert video.status == "completed"
    assert video.expires_at - video.completed_at in (TTL_SECONDS, TTL_SECONDS + 1)
    files = guarded.log.parent / "outputs" / "videos"

    assert [listed.id for listed in alice.videos.list()] == [video.id]
    assert alice.videos.download_content(video.id).read()
    assert list(bob.videos.list()) == []
    for call in (bob.videos.retrieve, bob.videos.download_content, bob.videos.delete):
        with pytest.raises(NotFoundError):
            call(video.id)
    assert [listed.id for listed in admin.videos.list()] == [video.id]
    assert list(files.iterdir())

    deadline = video.completed_at + TTL_SECONDS + 5
    while list(files.iterdir()):
        assert time.time() < deadline
        time.sleep(0.1)
    assert time.time() > video.completed_at + TTL_SECONDS
    with pytest.raises(NotFoundError):
        alice.videos.retrieve(video.id)


def log_lines(server: Server) -> list[dict[str, Any]]:
    """The server's own log lines in what its processes write to stderr."""
    logs = {server.log}
    for process in server.processes():
        with suppress(OSError):
            logs.add(Path(os.readlink(f"/proc/{process.pid}/fd/2")))
    lines = [line for log in logs if log.is_file() for line in log.read_text().splitlines()]
    for secret in (ALICE, BOB, ADMIN, "sk-wrong", VIDEO["prompt"]):
        assert not [line for line in lines if secret in line]
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [line for line in found if "process" in line]


def test_the_log_leads_from_a_request_to_its_job_and_on(guarded: Server) -> None:
    headers = {"x-request-id": "request-to-be-found"}
    video = client_of(guarded, ALICE).videos.create(**VIDEO, extra_headers=headers)
    with pytest.raises(AuthenticationError):
        client_of(guarded, "sk-wrong").videos.create(**VIDEO)
    while client_of(guarded, ALICE).videos.retrieve(video.id).status != "completed":
        time.sleep(0.05)
    lines = log_lines(guarded)
    (answered,) = [line for line in lines if line.get("request_id") == "request-to-be-found"]
    assert (answered["process"], answered["job_id"]) == ("ingress", video.id)
    assert answered["message"].startswith("POST /v1/videos 200 in ")
    assert {line["process"] for line in lines if line.get("job_id") == video.id} == {"ingress", "state", "engine"}
    with suppress(NotFoundError):
        client_of(guarded, ALICE).videos.delete(video.id)
