"""A gang of four real ranks over gloo, spawned once and shared by all tests that need ranks.

A test sends the ranks a function of its module and gets each rank's result back:

    def total(mesh: Mesh, value: int) -> int: ...

    def test_something(gang: Gang) -> None:
        assert gang.run(total, ParallelDims(ulysses_degree=4), 3) == [12, 12, 12, 12]
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from configs.parallel import ParallelDims

P = ParamSpec("P")
R = TypeVar("R")

SIZE = 4
COLLECTIVE_TIMEOUT = timedelta(seconds=60)
"""How long ranks wait for another that failed."""


class Gang:
    """Four processes. Their mesh is rebuilt whenever its dimensions change or a function failed."""

    def __init__(self, directory: Path):
        """Spawn the ranks; they meet in files under `directory` (fixed ports collide)."""
        self.directory = directory
        self.meetings = 0
        self.dims: ParallelDims | None = None
        # One process imports the libraries and forks each rank: 4 imports at once take 15 s on 2 cores.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch.distributed", "diffusers.hooks", "diffusers.models", "tests.tiny_models"]
        )
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(SIZE):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, rank), daemon=True)
            process.start()
            there.close()
            self.connections.append(here)
            self.processes.append(process)

    def run(
        self, function: Callable[Concatenate[Any, P], R], dims: ParallelDims, *args: P.args, **kwargs: P.kwargs
    ) -> list[R]:
        """Call `function(mesh, *args, **kwargs)` on the first `dims.gang_size` ranks; return the results by rank.

        Raises:
            RankError: it failed on some rank; the message holds each traceback.
        """
        ranks = self.connections[: dims.gang_size]
        if dims != self.dims:
            self.meetings += 1
            self.dims = dims
            for connection in self.connections:
                connection.send((_meet, (dims, f"file://{self.directory / str(self.meetings)}"), {}))
            self._collect(self.connections)
        for connection in ranks:
            connection.send((function, args, kwargs))
        return self._collect(ranks)

    def _collect(self, connections: list[Connection]) -> list[Any]:
        with ThreadPoolExecutor(len(connections)) as pool:
            outcomes = list(pool.map(lambda connection: connection.recv(), connections))
        failures = [f"rank {rank}:\n{outcome}" for rank, (failed, outcome) in enumerate(outcomes) if failed]
        if failures:
            self.dims = None
            raise RankError("\n".join(failures))
        return [outcome for _, outcome in outcomes]

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(10)
            process.kill()


class RankError(AssertionError):
    """What ranks raised."""


class _Seat:
    """What a rank process keeps between two functions."""

    def __init__(self, rank: int):
        self.rank = rank
        self.mesh: Any = None

    def leave(self) -> None:
        if self.mesh is not None:
            self.mesh.close()
            self.mesh = None


def _meet(seat: _Seat, dims: ParallelDims, init_method: str) -> None:
    import torch

    from pipelines.parallel.mesh import Mesh

    seat.leave()
    if seat.rank < dims.gang_size:
        seat.mesh = Mesh.create(dims, seat.rank, torch.device("cpu"), init_method, COLLECTIVE_TIMEOUT)


def _work(connection: Connection, rank: int) -> None:
    """A rank's process: call the functions it receives until the test process is gone."""
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    seat = _Seat(rank)
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            seat.leave()
            return
        try:
            result = function(seat if function is _meet else seat.mesh, *args, **kwargs)
            connection.send((False, result))
        except Exception:
            seat.leave()  # closes the connections on which the others would wait
            connection.send((True, traceback.format_exc()))
