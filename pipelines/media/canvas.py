"""The size a pipeline computes for a job, which may be larger than the size that the job asks for."""

from __future__ import annotations

from dataclasses import dataclass

from configs.model_family import ModelFamily
from pipelines.job import Job


@dataclass(frozen=True)
class Canvas:
    """The size a pipeline computes: the next size the model supports, whose top left part is the requested one."""

    width: int
    height: int
    num_frames: int

    @classmethod
    def for_job(cls, job: Job, family: ModelFamily) -> Canvas:
        return cls(
            width=next_multiple(job.width, family.size_multiple),
            height=next_multiple(job.height, family.size_multiple),
            num_frames=next_multiple(job.num_frames - 1, family.frame_multiple) + 1,
        )


def next_multiple(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
