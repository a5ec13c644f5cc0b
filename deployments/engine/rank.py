"""One rank of a gang: a Ray actor that holds its shard of the work and runs jobs in lock step with the others.

Every rank executes the same job; rank 0 leads. At the end of each denoising step, rank 0 decides whether the job
continues, and one small broadcast makes all ranks act alike. A rank never decides for itself: that would leave the
others inside a collective.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from datetime import timedelta
from enum import IntEnum
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from configs.model_family import ModelCard
from configs.server_args import ServerArgs
from deployments import log
from deployments.engine.rank_process import (
    cheap_imports,
    end_if_device_is_lost,
    have_gloo_listen_on,
    have_threads_spin_briefly,
    threads_for,
)
from deployments.engine.stall import Advance
from deployments.interfaces import LoadedAdapter
from pipelines.job import (
    Event,
    FailedAlone,
    InvalidJob,
    Job,
    LoRASpec,
    Media,
    OutputDone,
    Progress,
)

if TYPE_CHECKING:
    from lora.load import Source
    from lora.merge import Merger
    from pipelines.model.load import Model
    from pipelines.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


class Decision(IntEnum):
    """What rank 0 decides at the end of each step, for all ranks."""

    GO_ON = 0
    SUSPEND = 1
    STOP = 2


COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits inside a collective. Rank 0 decodes and encodes alone while the others are already done, so
this bounds a denoising step, not a job; a dead or hung rank is noticed from outside, long before."""

PROGRESS_SECONDS = 0.1
"""Interval between reported steps. A report involves four processes and a transaction: reporting every 20 ms step of a
tiny video made two ranks on two cores take 800 ms instead of 650."""


class Stopped(Exception):
    """The job was stopped between two steps, on every rank."""


class Suspended(Exception):
    """The job was suspended between two steps, on every rank; running it again resumes it."""


class WeightsLost(Exception):
    """A merge failed, and so did restoring the base weights: the model must be loaded again."""


class JobFailed(Exception):
    """The pipeline failed. Only the message crosses to the engine: unpickling the original class may need torch."""


class TooLarge(JobFailed):
    """The job does not fit into the memory of a rank's device, and will not on a retry."""


class Rank:
    """The actor. Calls run one at a time, on one thread, except those of the `control`, `health` and `vigil`
    groups.

    torch and diffusers are imported in `load`, so that the engine can name this class without loading them.
    """

    def __init__(self, args: ServerArgs, rank: int, ranks_on_node: int):
        log.configure(args, f"rank {rank}")
        self.args = args
        self.rank = rank
        self.cores = (os.cpu_count() or 1) // ranks_on_node
        """Its share of the node's cores."""
        self.model: Model
        self.weights: int
        """Number of parameters of its transformers."""
        self.merger: Merger
        self.mesh: Mesh | None = None
        self._orders: dict[str, Decision] = {}
        """By job, the order received since its last step. Only rank 0 has any."""
        self._advance = Advance()
        self._suspended: dict[str, Generator[Event]] = {}

    @ray.method(concurrency_group="control")
    def rendezvous(self) -> str:
        """Where the gang meets: an address on this rank's node with a port that is free now."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def load(self, init_method: str | None) -> ModelCard:
        """Join the gang (when there is more than one rank) and load the model onto this rank's device.

        Raises:
            ValueError: the model cannot be loaded or sharded, its weights cannot be restored as `lora_restore` says, or
                `lora_dir` does not exist; the message is for the user.
        """
        if self.args.lora_dir is not None and not Path(self.args.lora_dir).is_dir():
            raise ValueError(f"There is no folder '{self.args.lora_dir}' to take adapters from")
        have_threads_spin_briefly()
        with cheap_imports():
            import torch

            from lora.merge import Merger
            from lora.originals import Checkpoint, HostCopies
            from pipelines.model.load import load_model, resolve_device
            from pipelines.parallel.mesh import Mesh

        # Ray sets OMP_NUM_THREADS from num_cpus, which is a scheduling fraction here: share the cores instead.
        torch.set_num_threads(max(1, self.cores))
        if init_method is not None:
            have_gloo_listen_on(ray.util.get_node_ip_address())
            self.mesh = Mesh.create(
                self.args.parallel, self.rank, resolve_device(self.args.device), init_method, COLLECTIVE_TIMEOUT
            )
        self.model = load_model(self.args, self.mesh)
        self.weights = sum(weight.numel() for each in self.model.transformers.values() for weight in each.parameters())
        reload = self.args.lora_restore == "reload"
        originals = Checkpoint(self.model.transformers, self.model.directory) if reload else HostCopies()
        self.merger = Merger(self.model.transformers, originals)
        return self.model.card

    def lead(self, job: Job, media: Media, progress: bool) -> Iterator[Event]:
        """Rank 0's part of a job: yield its events, the last of which is its `Result`.

        Raises:
            Stopped: `stop` was called.
            Suspended: `suspend` was called; the same call again resumes after the last finished step.
        """
        told = -inf
        for event in self._steps(job, media):
            if isinstance(event, Progress):
                is_due = time.monotonic() - told >= PROGRESS_SECONDS or event.step == event.total
                if not (progress and is_due):
                    continue
                told = time.monotonic()
            if not isinstance(event, OutputDone):
                yield event

    def follow(self, job: Job, media: Media) -> None:
        """The other ranks' part of a job."""
        for _ in self._steps(job, media):
            pass

    def _steps(self, job: Job, media: Media) -> Iterator[Event]:
        import torch

        from pipelines.generation.generation import generate

        torch.set_num_threads(threads_for(self.weights, job.width * job.height * job.num_frames, self.cores))
        generation = self._suspended.pop(job.id, None) or generate(self.model, job, media)
        # An order may come before its job begins, or after that has ended: keep only this job's.
        for other in set(self._orders) - {job.id}:
            del self._orders[other]
        try:
            with self._advance.of_a_job():
                for event in generation:
                    self._advance.step()
                    is_common = isinstance(event, Progress | OutputDone)
                    decision = self._agree(job.id) if is_common else Decision.GO_ON
                    if decision is Decision.STOP:
                        raise Stopped(job.id)
                    yield event
                    if decision is Decision.SUSPEND:
                        self._suspended[job.id] = generation
                        raise Suspended(job.id)
        except (InvalidJob, Stopped, Suspended):
            raise
        except Exception as error:
            with log.about(job.id):
                logger.exception("the generation failed")
            end_if_device_is_lost(self.model.device)
            if isinstance(error, FailedAlone) and self.mesh is not None:
                self.mesh.agree(Decision.STOP)  # where the others wait, or soon will
            failure = _in_words(error)
        else:
            return
        finally:
            self._orders.pop(job.id, None)
            if job.id not in self._suspended:
                generation.close()
        # Raised only here, where nothing refers to `error` any more: raised in the handler, or with `error` kept by
        # name, it would be part of a reference cycle that keeps the pipeline's frames, with their latents and
        # activations, until a later job.
        raise failure

    def _agree(self, job_id: str) -> Decision:
        decision = self._orders.pop(job_id, Decision.GO_ON)
        return decision if self.mesh is None else Decision(self.mesh.agree(decision))

    @ray.method(concurrency_group="control")
    def stop(self, job_id: str) -> None:
        """Stop the running job at the end of its current step. Only rank 0 needs this call."""
        self._orders[job_id] = Decision.STOP

    @ray.method(concurrency_group="control")
    def suspend(self, job_id: str) -> None:
        """Suspend the running job at the end of its current step. Only rank 0 needs this call."""
        self._orders.setdefault(job_id, Decision.SUSPEND)

    def discard(self, job_id: str) -> None:
        """Forget a suspended job. Every rank needs this call."""
        self._suspended.pop(job_id).close()

    def merge(self, composition: Sequence[LoRASpec], factors: Mapping[str, ray.ObjectRef]) -> None:
        """Make `composition` what is merged into the weights; an empty one restores the base weights.

        Args:
            factors: what `load_lora` returned, by identity, as references into the object store.

        Raises:
            ValueError: an adapter does not fit the model; nothing has changed.
            ObjectLostError: the factors are gone; nothing has changed.
            WeightsLost: the weights are no longer known.
            Exception: whatever else went wrong; the weights are the base weights again.
        """
        from lora.load import Factors

        blocks = dict(zip(factors, ray.get(list(factors.values())), strict=True))
        adapters = {identity: Factors.from_bytes(memoryview(block)) for identity, block in blocks.items()}
        # An offloaded transformer's weights are its host copy, except while a suspended job keeps it on the device.
        self.model.rest_transformers()
        try:
            self.merger.merge([(adapters[spec.identity], spec.strength, spec.target) for spec in composition])
        except ValueError:
            raise
        except Exception as error:
            if self.merger.holds_a_merge:
                raise WeightsLost(f"the base weights could not be restored after {error!r}") from error
            raise

    @ray.method(concurrency_group="control")
    def identify_lora(self, path: str) -> str:
        """Identity of the adapter at `path`. Raises `ValueError` (`InvalidAdapter`) when there is none."""
        return self._resolve(path).identity

    @ray.method(concurrency_group="control")
    def load_lora(self, path: str) -> LoadedAdapter:
        """Read, convert and validate an adapter; the weights stay as they are, so a job may run meanwhile."""
        import numpy as np

        from lora.load import load

        source = self._resolve(path)
        factors = load(source, type(self.model.pipeline), self.model.transformers)
        return LoadedAdapter(
            identity=source.identity,
            # An array is read in place in the object store; bytes would be copied by every reader.
            factors=ray.put(np.frombuffer(factors.to_bytes(), np.uint8)),
            rank=factors.rank,
            num_bytes=factors.num_bytes,
            transformers=factors.transformers,
        )

    def _resolve(self, path: str) -> Source:
        from lora.load import resolve

        return resolve(path, None if self.args.lora_dir is None else Path(self.args.lora_dir))

    @ray.method(concurrency_group="control")
    def lora_bytes_held(self) -> int:
        return self.merger.num_bytes_held

    @ray.method(concurrency_group="vigil")
    def keep_vigil(self) -> None:
        """Never return: the call fails as soon as this process dies."""
        threading.Event().wait()

    @ray.method(concurrency_group="health")
    def ping(self) -> int:
        """Return the process id, even while a job runs or an adapter is read.

        Raises:
            Stalled: the job makes no progress.
        """
        self._advance.check()
        return os.getpid()


def _in_words(error: Exception) -> JobFailed:
    import torch

    reason = error.__cause__ if isinstance(error, FailedAlone) else error
    kind = TooLarge if isinstance(reason, torch.OutOfMemoryError) else JobFailed
    return kind(f"{type(reason).__name__}: {reason}")
