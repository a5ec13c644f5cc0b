"""Prometheus metrics for operators, which Ray collects from every process and serves on a port of each node.

There, names begin with `ray_`. No label is a prompt, an id or a path: label values are the few words below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ray.util.metrics import Counter, Gauge, Histogram

from deployments.engine.schedule import Schedule
from deployments.engine.ticket import Ticket

Outcome = Literal["completed", "failed", "refused", "timeout", "left"]
"""How a job ended: `refused` by the pipeline as the client's fault, `left` by a client that disconnected or
cancelled."""

STAGE_SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]
"""Bounds of the histogram's buckets."""


class EngineMetrics:
    """Metrics of one engine replica. Create it in the replica's process."""

    def __init__(self) -> None:
        kind, stage = ("kind",), ("kind", "stage")
        self._waiting = Gauge("ditserve_queue_length", "Jobs waiting for the gang.", kind)
        self._running = Gauge("ditserve_running", "Jobs that the gang computes: zero or one.", kind)
        self._jobs = Counter("ditserve_jobs", "Jobs that ended, by outcome.", ("kind", "outcome"))
        self._steps = Counter("ditserve_steps", "Denoising steps done.", kind)
        self._seconds = Histogram("ditserve_stage_seconds", "Seconds of a job by stage.", STAGE_SECONDS, stage)
        self.preemptions = Counter("ditserve_preemptions", "Times that a video paused for an image.")
        self.retries = Counter("ditserve_retries", "Jobs restarted because the gang broke.")
        self.rebuilds = Counter("ditserve_gang_rebuilds", "Gangs that were replaced.")
        self.lora_swaps = Counter("ditserve_lora_swaps", "Changes of the adapters in the weights.")

    def queue(self, schedule: Schedule, running: Ticket | None) -> None:
        """Record a change of the queue."""
        for kind in ("image", "video"):
            self._waiting.set(sum(_kind(ticket) == kind for ticket in schedule), {"kind": kind})
            self._running.set(int(running is not None and _kind(running) == kind), {"kind": kind})

    def steps(self, ticket: Ticket, count: int) -> None:
        self._steps.inc(count, {"kind": _kind(ticket)})

    def ended(self, ticket: Ticket, outcome: Outcome, seconds: Mapping[str, float] | None = None) -> None:
        """Record that a job ended; `seconds` by stage if it was completed."""
        self._jobs.inc(1, {"kind": _kind(ticket), "outcome": outcome})
        for stage, value in (seconds or {}).items():
            self._seconds.observe(max(value, 1e-9), {"kind": _kind(ticket), "stage": stage})


def _kind(ticket: Ticket) -> str:
    return "video" if ticket.is_video else "image"
