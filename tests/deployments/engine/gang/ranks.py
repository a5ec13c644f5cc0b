"""What the tests run on a gang: jobs, and calls inside its ranks' processes."""

from __future__ import annotations

from typing import Any

from deployments.engine.gang import Gang
from pipelines.job import Event, Job, Media, Task


def job(name: str, steps: int = 3, **changes: object) -> Job:
    values = {"task": Task.TEXT_TO_IMAGE, "prompt": "a cat", "width": 64, "height": 64, "seeds": (1,)}
    return Job(id=name, num_inference_steps=steps, **{**values, **changes})


async def events_of(gang: Gang, a_job: Job, media: Media | None = None) -> list[Event]:
    return [event async for event in gang.run(a_job, media or {}, progress=True)]


async def on(rank: Any, function: Any, *args: Any) -> Any:
    """Call a function with the actor itself, inside its process."""
    return await rank.__ray_call__.remote(function, *args)
