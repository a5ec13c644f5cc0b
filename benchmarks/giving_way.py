"""How soon the gang is free for another job: an image behind a long video, and the job after a DELETE.

    python -m benchmarks.giving_way [--ranks 1] [--repeats 10]

Baseline: the same image behind a shorter video on a server with `--no-preemption`, and the same image on an idle
server. Beyond its own time, an image behind a video should take at most two steps of the video, and after a DELETE at
most one step and 50 ms.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.timing import seconds
from tests.e2e.server import Server, running_server

VIDEO = {"size": "256x256", "num_frames": 17, "num_inference_steps": 60, "seed": 1}
"""Long enough to be interrupted midway, with steps long enough to stand out from the rest."""

SHORT_VIDEO_STEPS = 20
"""Steps of the video that an image waits out without preemption."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    flags = ("--num-gpus", str(arguments.ranks))
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), *flags) as server:
        server.picture()
        step = seconds_per_step(server)
        alone = median(arguments.repeats, lambda: seconds(server.picture))
        behind = median(arguments.repeats, lambda: behind_a_video(server))
        deleted = median(arguments.repeats, lambda: after_a_delete(server))
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), *flags, "--no-preemption") as server:
        server.picture()
        waited_out = median(3, lambda: behind_a_video(server, steps=SHORT_VIDEO_STEPS))
    print(f"{arguments.ranks} rank(s): a step of the video {step * 1e3:.0f} ms, a picture alone {alone * 1e3:.0f} ms")
    print(
        f"picture behind the video: {behind * 1e3:.0f} ms, its own time and {(behind - alone) / step:.2f} steps; "
        f"without preemption {waited_out * 1e3:.0f} ms behind one of {SHORT_VIDEO_STEPS} steps"
    )
    print(
        f"picture after the video's DELETE: {deleted * 1e3:.0f} ms, its own time and {(deleted - alone) * 1e3:.0f} ms "
        f"(a step is {step * 1e3:.0f} ms)"
    )


def median(repeats: int, measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(repeats))


def seconds_per_step(server: Server) -> float:
    video = server.wait_for_video(server.create_video(**{**VIDEO, "num_inference_steps": SHORT_VIDEO_STEPS})["id"])
    return video["timings"]["denoise"] / SHORT_VIDEO_STEPS


def behind_a_video(server: Server, steps: int = 60) -> float:
    """Seconds that an image takes if it arrives while a video is computed."""
    video_id = running_video(server, steps)
    took = seconds(server.picture)
    server.http.delete(f"/v1/videos/{video_id}")
    return took


def after_a_delete(server: Server) -> float:
    """Seconds from the DELETE of a running video to the image requested right after it."""
    video_id = running_video(server, 60)

    def delete_and_ask() -> None:
        server.http.delete(f"/v1/videos/{video_id}")
        server.picture()

    return seconds(delete_and_ask)


def running_video(server: Server, steps: int) -> str:
    video_id = server.create_video(**{**VIDEO, "num_inference_steps": steps})["id"]
    server.wait_for_video(video_id, lambda video: video["progress"] > 0)
    return video_id


if __name__ == "__main__":
    main()
