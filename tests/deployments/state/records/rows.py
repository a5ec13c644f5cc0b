"""Jobs to record."""

from __future__ import annotations

from deployments.interfaces import VideoError, VideoStatus
from deployments.state.records import Records
from pipelines.job import Job, LoRASpec, Task

QUEUED, IN_PROGRESS, COMPLETED, FAILED = VideoStatus
OUT_OF_MEMORY = VideoError("server_error", "The GPUs are out of memory")


def a_job(video_id: str) -> Job:
    return Job(
        id=video_id,
        task=Task.IMAGE_TO_VIDEO,
        prompt="a lighthouse — 灯台",
        width=832,
        height=480,
        num_frames=81,
        fps=16,
        num_inference_steps=50,
        seeds=(7, 8),
        images=("0" * 64,),
        lora=(LoRASpec(nickname="ink", identity="ink@1", strength=0.5),),
        output_format="mp4",
    )


def a_video(records: Records, status: VideoStatus, video_id: str = "video_1") -> str:
    """Bring a new job to `status` by the shortest legal path."""
    records.videos.create(a_job(video_id), "wan", None, ())
    way = {QUEUED: (), IN_PROGRESS: (IN_PROGRESS,), COMPLETED: (IN_PROGRESS, COMPLETED), FAILED: (FAILED,)}
    for step in way[status]:
        records.videos.transition(video_id, step, error=OUT_OF_MEMORY if step is FAILED else None)
    return video_id
