"""What waits, what goes first, what is refused: the queue of a real server with a gang of two and a tiny model."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx2

from tests import tiny_models
from tests.chaos.victims import lose
from tests.e2e.conftest import MAX_QUEUE, MAX_RETRIES, TWO_EXPERTS
from tests.e2e.server import SMALL, Server
from tests.lora.adapters import save, train, with_prefix

LONG = {"num_inference_steps": 40, "seed": 11}


def long_video(server: Server, **fields: Any) -> str:
    """The id of a video that is being made."""
    video_id = server.create_video(**{**LONG, **fields})["id"]
    server.wait_for_video(video_id, lambda video: video["status"] == "in_progress")
    return video_id


def content(server: Server, video_id: str) -> bytes:
    assert server.wait_for_video(video_id)["status"] == "completed"
    return server.http.get(f"/v1/videos/{video_id}/content").content


def test_a_video_gives_way_to_pictures_and_has_the_pixels_of_one_that_was_left_alone(gang_of_two: Server) -> None:
    undisturbed = gang_of_two.clip(**LONG)
    picture = gang_of_two.picture(seed=3)
    video_id = long_video(gang_of_two)
    assert [gang_of_two.picture(seed=3) for _ in range(3)] == [picture] * 3
    assert gang_of_two.video(video_id)["status"] == "in_progress"
    assert content(gang_of_two, video_id) == undisturbed


def test_set_lora_does_not_wait_for_the_whole_of_a_video(gang_of_two: Server, tmp_path: Path) -> None:
    trained = train(tiny_models.build(TWO_EXPERTS).transformer, ["to_q"])
    adapter = save(with_prefix("transformer.", trained.state), tmp_path / "adapter.safetensors")
    undisturbed = gang_of_two.clip(**LONG)
    video_id = long_video(gang_of_two)
    body = {"lora_nickname": "A", "lora_path": str(adapter)}
    assert gang_of_two.http.post("/v1/set_lora", json=body).status_code == 200
    assert gang_of_two.video(video_id)["status"] == "in_progress"
    assert gang_of_two.http.post("/v1/unmerge_lora_weights").status_code == 200
    assert content(gang_of_two, video_id) == undisturbed


def test_endless_pictures_do_not_starve_a_video(gang_of_two: Server) -> None:
    enough = Event()

    def keep_asking(seed: int) -> None:
        while not enough.is_set():
            gang_of_two.picture(seed=seed)

    with ThreadPoolExecutor(2) as clients:
        asking = [clients.submit(keep_asking, seed) for seed in range(2)]
        try:
            video_id = long_video(gang_of_two, num_inference_steps=2)
            assert gang_of_two.wait_for_video(video_id)["status"] == "completed"
        finally:
            enough.set()
        for client in asking:
            client.result()


def test_a_full_queue_of_videos_is_refused_until_one_is_done(gang_of_two: Server) -> None:
    made = [gang_of_two.create_video(**LONG)["id"] for _ in range(MAX_QUEUE)]
    refused = gang_of_two.http.post("/v1/videos", json=SMALL)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) > 0
    assert len(gang_of_two.http.get("/v1/videos?limit=100").json()["data"]) >= MAX_QUEUE
    assert gang_of_two.http.delete(f"/v1/videos/{made[0]}").status_code == 200
    made[0] = gang_of_two.create_video(**LONG)["id"]
    for video_id in made:
        gang_of_two.http.delete(f"/v1/videos/{video_id}")


def test_a_full_queue_of_pictures_is_refused_and_the_rest_are_made(gang_of_two: Server) -> None:
    def ask(seed: int) -> int:
        body = {**SMALL, "num_inference_steps": 15, "seed": seed}
        return gang_of_two.http.post("/v1/images/generations", json=body).status_code

    with ThreadPoolExecutor(4 * MAX_QUEUE) as clients:
        answers = list(clients.map(ask, range(4 * MAX_QUEUE)))
    assert set(answers) == {200, 429}
    assert answers.count(200) >= MAX_QUEUE
    assert gang_of_two.picture()


def test_a_cancelled_video_stops_and_stays_listed(gang_of_two: Server) -> None:
    video_id = long_video(gang_of_two)
    cancelled = gang_of_two.http.post(f"/v1/videos/{video_id}/cancel")
    assert cancelled.status_code == 200
    assert (cancelled.json()["status"], cancelled.json()["error"]["code"]) == ("failed", "cancelled")
    assert gang_of_two.video(video_id) == cancelled.json()
    started = time.monotonic()
    gang_of_two.picture()
    assert time.monotonic() - started < 20
    assert gang_of_two.http.post("/v1/videos/video_nobody_made/cancel").status_code == 404


def test_a_picture_that_is_not_done_in_time_is_given_up(gang_of_two: Server) -> None:
    body = {**SMALL, "num_inference_steps": 1000, "timeout": 0.5}
    late = gang_of_two.http.post("/v1/images/generations", json=body)
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "timeout"
    assert late.headers["x-should-retry"] == "false"
    assert gang_of_two.picture()


def test_a_video_that_is_not_done_in_time_fails_also_while_it_waits(gang_of_two: Server) -> None:
    running = long_video(gang_of_two, num_inference_steps=1000)
    waiting = gang_of_two.create_video(timeout=0.5)["id"]
    failed = gang_of_two.wait_for_video(waiting)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "timeout")
    gang_of_two.http.delete(f"/v1/videos/{running}")


def test_a_job_that_breaks_its_workers_each_time_fails_alone(gang_of_two: Server) -> None:
    poison = long_video(gang_of_two, num_inference_steps=1000)
    innocent = gang_of_two.create_video()["id"]
    for _ in range(1 + MAX_RETRIES):
        assert gang_of_two.video(poison)["status"] == "in_progress"
        assert lose(gang_of_two, "rank")
        wait_until_healed(gang_of_two)
    failed = gang_of_two.wait_for_video(poison)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "worker_failed")
    assert content(gang_of_two, innocent)


def wait_until_healed(server: Server) -> None:
    """Wait until the ranks are not ready, and then until they are."""
    deadline = time.monotonic() + 120
    for status in (503, 200):
        while server.http.get("/ready").status_code != status:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_prometheus_is_told_what_happened_and_nothing_of_what_clients_wrote(
    gang_of_two: Server, metrics_port: int
) -> None:
    gang_of_two.picture(prompt="a secret lighthouse")
    video_id = gang_of_two.wait_for_video(gang_of_two.create_video()["id"])["id"]
    wanted = (
        'ditserve_jobs_total{kind="image",outcome="completed"}',
        'ditserve_jobs_total{kind="video",outcome="completed"}',
        'ditserve_steps_total{kind="video"}',
        'ditserve_stage_seconds_count{kind="image",stage="denoise"}',
        'ditserve_queue_length{kind="video"}',
        'ditserve_running{kind="image"}',
        "ditserve_stored_bytes{}",
    )
    deadline = time.monotonic() + 60
    while not all(name in (found := metrics(metrics_port)) for name in wanted) and time.monotonic() < deadline:
        time.sleep(1)  # Ray collects them every few seconds
    assert set(wanted) <= set(found)
    text = " ".join(found)
    assert "lighthouse" not in text
    assert video_id not in text
    assert str(gang_of_two.log.parent) not in text


def metrics(port: int) -> dict[str, float]:
    """The server's metrics with the server's labels: Ray adds its own."""
    found = {}
    for line in httpx2.get(f"http://127.0.0.1:{port}/metrics").text.splitlines():
        if match := re.match(r"ray_(ditserve_\w+)\{(.*)\} (\S+)$", line):
            name, labels, value = match.groups()
            ours = [label for label in labels.split(",") if label.startswith(("kind=", "outcome=", "stage="))]
            found[f"{name}{{{','.join(ours)}}}"] = float(value)
    return found
