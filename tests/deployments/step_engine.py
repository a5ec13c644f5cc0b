"""An engine for tests of its surroundings: it yields real events in real time and keeps a journal on disk."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from hashlib import sha256
from pathlib import Path

from pipelines.job import Event, Job, Media, Output, Progress, Result


class StepEngine:
    """Takes only the steps that tests, in any process, allow. Its pixels depend on the job and its inputs."""

    def __init__(self, folder: Path):
        self.folder = folder

    async def generate(self, job: Job, media: Media, *, progress: bool) -> AsyncGenerator[Event, None]:
        total = job.num_inference_steps
        self._write_journal(job, "began")
        try:
            for step in range(total + 1):
                while max(step, 1) > self._allowed(job.id):
                    await asyncio.sleep(0.005)
                if progress:
                    yield Progress(step, total)
            yield Result(pixels(job, media), seconds={"denoise": 0.25, "decode": 0.5})
        except (asyncio.CancelledError, GeneratorExit):
            self._write_journal(job, "stopped")
            raise
        self._write_journal(job, "ended")

    def allow(self, video_id: str, steps: int) -> None:
        """Let a job run up to this step; with 0 it does not begin. A job without a limit takes all steps at once."""
        (self.folder / f"{video_id}.limit").write_text(str(steps))

    def journal(self, video_id: str) -> list[str]:
        """What happened to the job: `began`, `stopped`, `ended`."""
        return [what for video, what, _ in self._lines() if video == video_id]

    def pid(self) -> int:
        """The id of the process in which the last job began."""
        return [int(pid) for _, what, pid in self._lines() if what == "began"][-1]

    def _lines(self) -> list[list[str]]:
        path = self.folder / "journal"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def _allowed(self, video_id: str) -> float:
        path = self.folder / f"{video_id}.limit"
        return int(path.read_text() or 0) if path.exists() else float("inf")

    def _write_journal(self, job: Job, what: str) -> None:
        with (self.folder / "journal").open("a") as file:
            file.write(f"{job.id} {what} {os.getpid()}\n")


def pixels(job: Job, media: Media) -> tuple[Output, ...]:
    inputs = b"".join(media[name] for name in job.images)

    def file(kind: str, seed: int) -> bytes:
        return sha256(f"{kind} {seed} {job.prompt}".encode() + inputs).digest() * 1000

    return tuple(Output(file("clip", seed), file("thumbnail", seed), file("sheet", seed)) for seed in job.seeds)
