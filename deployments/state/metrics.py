"""Prometheus metrics of the state actor; those of an engine replica are in `deployments.engine.metrics`."""

from __future__ import annotations

from ray.util.metrics import Gauge


class StateMetrics:
    """Metrics of the state actor. Create it in the actor's process."""

    def __init__(self) -> None:
        self.stored_bytes = Gauge("ditserve_stored_bytes", "All that is kept: finished files and inputs of jobs.")
