"""A client other than OpenAI's: LiteLLM, which has its own implementation of edits and videos."""

from __future__ import annotations

import json
import os
import subprocess
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.pictures import decoded_frames, opened, picture
from tests.e2e.server import ANSWER_SECONDS, SHORT, Server

REPOSITORY = Path(__file__).parents[2]

PYTHON = REPOSITORY / ".venv-litellm" / "bin" / "python"
"""Made by `make .venv-litellm/installed`, on which `make test` depends."""

CLIENT = Path(__file__).with_name("litellm_client.py")


@pytest.fixture(scope="module")
def answers(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What LiteLLM received, by call."""
    file = tmp_path_factory.mktemp("litellm") / "picture.png"
    file.write_bytes(picture())
    (model,) = server.http.get("/v1/models").json()["data"]
    done = subprocess.run(
        [str(PYTHON), str(CLIENT), server.base_url, str(file), model["id"]],
        # LiteLLM looks up prices on the internet unless it is told not to.
        env={**os.environ, "PYTHONPATH": "", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        text=True,
        timeout=2 * ANSWER_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_image_generation(server: Server, answers: dict[str, Any]) -> None:
    assert b64decode(answers["generated"][0]) == server.picture(seed=7)
    assert b64decode(answers["generated"][1]) == server.picture(seed=8)


def test_image_edit(answers: dict[str, Any]) -> None:
    (image,) = answers["edited"]
    assert opened(b64decode(image)).size == (64, 64)


def test_video_generation_status_and_content(server: Server, answers: dict[str, Any]) -> None:
    assert answers["created"] == "queued"
    assert answers["done"] == ["completed", 100, "64x64", "1"]
    clip = b64decode(answers["clip"])
    assert len(decoded_frames(clip)) == SHORT["num_frames"]
    assert clip == server.clip(seed=7)
    assert opened(b64decode(answers["thumbnail"])).format == "WEBP"


def test_video_generation_from_a_picture(answers: dict[str, Any]) -> None:
    assert answers["done from a picture"] == "completed"


def test_video_list(answers: dict[str, Any]) -> None:
    assert [video["status"] for video in answers["listed"]["data"]] == ["completed", "completed"]
    assert answers["listed"]["object"] == "list"


def test_a_refusal_is_a_bad_request_with_the_servers_words(answers: dict[str, Any]) -> None:
    assert answers["refusal"]["status"] == 400
    assert "it must be 'auto' or WIDTHxHEIGHT in pixels" in answers["refusal"]["message"]
