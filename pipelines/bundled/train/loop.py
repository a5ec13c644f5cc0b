"""The training loop of every stage: batches, steps, averages, checkpoints, a log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pipelines.bundled.train.optimizer import MuonAdamW
from pipelines.bundled.train.recipe import StageRecipe

FORMAT = 1
"""Version of the checkpoints."""

LOG_STEPS = 20


class BatchSource(Protocol):
    """The part of a stage that worker processes get: no networks."""

    def batch(self, step: int) -> Any:
        """The data of a step, on the CPU, as a function of the step alone."""


class Stage(Protocol):
    """What one stage trains. Its noise is a function of the step alone too, so that a resumed run equals an
    uninterrupted one."""

    optimizer: MuonAdamW

    @property
    def name(self) -> str: ...

    @property
    def recipe(self) -> StageRecipe: ...

    @property
    def source(self) -> BatchSource: ...

    @property
    def module(self) -> nn.Module:
        """Everything that is trained."""

    @property
    def average(self) -> nn.Module:
        """The same networks with the moving average of the weights, which is the one served."""

    def loss(self, batch: Any, step: int) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The loss of this batch, and the values to log, all scalars."""


@dataclass(frozen=True)
class Limits:
    minutes: float | None
    """Wall time after which this run pauses; None for no limit."""
    checkpoint_minutes: float = 5.0
    workers: int = 0
    """Processes that prepare batches ahead; 0 prepares them in the loop."""
    first_step: int = 0
    """The recipe's step to start at if there is no checkpoint: a stage with trained weights need not start at 0."""


@dataclass(frozen=True)
class Batches(Dataset):
    source: BatchSource

    def __getitem__(self, step: int) -> Any:
        return self.source.batch(step)


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the hardware supports it: on GPUs, and on CPUs with AMX or AVX-512 BF16."""
    fast = device.type != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def train(stage: Stage, directory: Path, limits: Limits, *, resume: bool) -> int:
    """Train until the recipe's last step or the time limit, and return the number of steps done in all.

    `directory` gets `<stage>.pt`, the checkpoint, and `<stage>.jsonl`, the log: every 20 steps a line of means, with
    the seconds since this run began.

    Raises:
        FileExistsError: there is a checkpoint and `resume` is false.
    """
    checkpoint, log = directory / f"{stage.name}.pt", directory / f"{stage.name}.jsonl"
    directory.mkdir(parents=True, exist_ok=True)
    step = limits.first_step
    if checkpoint.exists():
        if not resume:
            raise FileExistsError(f"'{checkpoint}' exists: resume it (--resume) or remove it")
        step = load_checkpoint(stage, checkpoint)
    started = saved = time.monotonic()
    means = Means()
    with log.open("a") as file, tqdm(total=stage.recipe.steps, initial=step, desc=stage.name, unit="step") as bar:
        for batch in _batches(stage, step, limits.workers):
            means.add(train_step(stage, batch, step))
            step += 1
            bar.update()
            now = time.monotonic()
            if step % LOG_STEPS == 0 or step == stage.recipe.steps:
                measured = means.take()
                bar.set_postfix({name: f"{value:.3f}" for name, value in measured.items()})
                file.write(json.dumps({"step": step, "seconds": round(now - started, 1), **measured}) + "\n")
                file.flush()
            paused = limits.minutes is not None and now - started > limits.minutes * 60
            if paused or now - saved > limits.checkpoint_minutes * 60:
                save_checkpoint(stage, step, checkpoint)
                saved = now
            if paused:
                return step
    save_checkpoint(stage, step, checkpoint)
    return step


def train_step(stage: Stage, batch: Any, step: int) -> Mapping[str, torch.Tensor]:
    loss, measured = stage.loss(batch, step)
    stage.optimizer.zero_grad()
    loss.backward()
    stage.optimizer.step(stage.recipe.rate_at(step))
    # The average starts with a small decay, or the random initial weights would linger for thousands of steps.
    decay = min(stage.recipe.ema_decay, (step + 1) / (step + 10))
    average: list[torch.Tensor] = list(stage.average.parameters())
    weights: list[torch.Tensor] = list(stage.module.parameters())
    with torch.no_grad():
        torch._foreach_lerp_(average, weights, 1 - decay)
    return {"loss": loss.detach(), **measured}


class Means:
    """Means of the steps' measurements. These stay on the device until taken: reading each would wait for it."""

    def __init__(self) -> None:
        self._measured: dict[str, list[torch.Tensor]] = {}

    def add(self, measured: Mapping[str, torch.Tensor]) -> None:
        for name, value in measured.items():
            self._measured.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        means = {name: round(torch.stack(values).mean().item(), 5) for name, values in self._measured.items()}
        self._measured = {}
        return means


def save_checkpoint(stage: Stage, step: int, path: Path) -> None:
    """Write a checkpoint atomically: a run that is killed while it writes keeps the previous one."""
    state = {
        "format": FORMAT,
        "step": step,
        "module": stage.module.state_dict(),
        "average": stage.average.state_dict(),
        "optimizer": stage.optimizer.state_dict(),
    }
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)


def load_checkpoint(stage: Stage, path: Path) -> int:
    """Restore `stage` from a checkpoint and return the number of steps done.

    Raises:
        ValueError: another version of the training wrote it.
        RuntimeError: its networks have other shapes.
    """
    state = torch.load(path, map_location=device_of(stage.module), weights_only=True)
    if state["format"] != FORMAT:
        raise ValueError(f"'{path}' is of format {state['format']}; this is {FORMAT}")
    stage.module.load_state_dict(state["module"])
    stage.average.load_state_dict(state["average"])
    stage.optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def load_average(module: nn.Module, path: Path) -> None:
    """Load only the averaged weights of a checkpoint into `module`."""
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["average"])


def _batches(stage: Stage, step: int, workers: int) -> Iterator[Any]:
    """The batches from `step` to the recipe's last, in order."""
    return iter(
        DataLoader(
            Batches(stage.source),
            batch_size=None,  # the stage makes whole batches
            sampler=range(step, stage.recipe.steps),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            # Not forked: the parent computes with threads, and a fork would copy their locks in any state.
            multiprocessing_context="spawn" if workers else None,
        )
    )
