"""The command in SGLang's documents: four ranks, Ulysses 2 by ring 2. Without GPUs, each is a process on CPUs."""

from __future__ import annotations

import json
import time
from base64 import b64decode
from collections.abc import Callable
from itertools import islice
from typing import Any

import httpx2
import numpy as np
import pytest

from tests.e2e.pictures import picture, pixels
from tests.e2e.server import SMALL, Server

LONG: dict[str, Any] = {**SMALL, "size": "128x128", "num_inference_steps": 1000}


def seconds(call: Callable[[], Any]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started


def test_there_are_four_ranks(four_ranks: Server) -> None:
    (model,) = four_ranks.http.get("/v1/models").json()["data"]
    assert model["num_gpus"] == 4
    assert len(four_ranks.ranks()) == 4


@pytest.mark.parametrize("fields", [{"size": "128x128"}, {"size": "80x48"}, {"size": "64x16"}, {"n": 2}], ids=str)
def test_a_picture_is_the_one_of_a_single_rank(four_ranks: Server, server: Server, fields: dict[str, Any]) -> None:
    ours, theirs = (pixels(each.picture(seed=5, **fields)) for each in (four_ranks, server))
    assert np.abs(ours - theirs).max() <= 1


def test_a_picture_of_fewer_tokens_than_ranks_is_refused(four_ranks: Server) -> None:
    """The last rank would have nothing to compute, and its failure would break the gang."""
    ranks = four_ranks.ranks()
    answer = four_ranks.http.post("/v1/images/generations", json={**SMALL, "size": "48x16"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "size")
    assert four_ranks.ranks() == ranks


def test_an_edit_is_the_one_of_a_single_rank(four_ranks: Server, server: Server) -> None:
    edits = []
    for each in (four_ranks, server):
        answer = each.http.post("/v1/images/edits", data={**SMALL, "seed": 5}, files={"image": picture()})
        assert answer.status_code == 200, answer.text
        edits.append(pixels(b64decode(answer.json()["data"][0]["b64_json"])))
    assert np.abs(edits[0] - edits[1]).max() <= 1


def test_a_clip_is_the_one_of_a_single_rank(four_ranks: Server, server: Server) -> None:
    """Compares their thumbnails: an MP4 encoder need not be exact."""
    thumbnails = []
    for each in (four_ranks, server):
        video = each.wait_for_video(each.create_video(seed=5, size="128x128")["id"])
        assert video["status"] == "completed", video
        content = each.http.get(f"/v1/videos/{video['id']}/content", params={"variant": "thumbnail"}).content
        thumbnails.append(pixels(content))
    assert np.abs(thumbnails[0] - thumbnails[1]).mean() <= 1


def test_deleting_a_running_video_frees_the_ranks(four_ranks: Server) -> None:
    started = time.monotonic()
    video = four_ranks.create_video(**LONG)
    progress = four_ranks.wait_for_video(video["id"], until=lambda video: video["progress"] >= 2)["progress"]
    whole = (time.monotonic() - started) * 100 / progress
    assert four_ranks.http.delete(f"/v1/videos/{video['id']}").status_code == 200
    assert seconds(four_ranks.picture) < whole / 4


def seconds_of_long_picture(server: Server) -> float:
    """Estimated from its first steps; the client then disconnects."""
    started = time.monotonic()
    with server.http.stream("POST", "/v1/images/generations", json={**LONG, "stream": True}) as answer:
        steps = list(islice(answer.iter_lines(), 40))
    step = int(steps[-2].removeprefix(": step ").removesuffix(" of 1000"))
    return (time.monotonic() - started) * 1000 / step


def test_leaving_a_stream_frees_the_ranks(four_ranks: Server) -> None:
    whole = seconds_of_long_picture(four_ranks)
    assert seconds(four_ranks.picture) < whole / 4


def test_leaving_a_plain_call_frees_the_ranks(four_ranks: Server) -> None:
    whole = seconds_of_long_picture(four_ranks)
    four_ranks.picture()
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{four_ranks.base_url}/v1/images/generations", json=LONG, timeout=1)
    assert seconds(four_ranks.picture) < whole / 4


def test_a_killed_leader_is_replaced_and_the_request_still_succeeds(four_ranks: Server) -> None:
    body = {**SMALL, "seed": 5, "num_inference_steps": 20}
    undisturbed = four_ranks.picture(**body)
    before = four_ranks.ranks()
    with four_ranks.http.stream("POST", "/v1/images/generations", json={**body, "stream": True}) as answer:
        lines = answer.iter_lines()
        assert ": step 5 of 20" in islice(lines, 20)
        before[0].kill()
        (data,) = (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))
    assert data["type"] == "image_generation.completed"
    assert b64decode(data["b64_json"]) == undisturbed

    assert four_ranks.http.get("/ready").status_code == 200
    after = four_ranks.ranks()
    assert len(after) == 4
    assert before[0] not in after
