"""What concerns a rank's process and not its jobs: threads, imports, the network, and when it must end itself."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SPIN_COUNT = "10000"
"""How often a libgomp thread looks for work before it sleeps: for a fraction of a millisecond, shorter than libgomp's
default and longer than the gap between two operations of a model. A 256x256 image of the bundled model, ten steps on
two cores, took 0.91 s (by default 1.07 s, with threads that sleep at once 1.39 s); beside a process that keeps a core
busy, 2.8 s (3.2 s, 1.4 s). So a server should have its cores to itself, or its user should set `OMP_WAIT_POLICY`."""


def have_threads_spin_briefly() -> None:
    """Set `SPIN_COUNT` for libgomp, which reads it when torch is imported, unless the user has set how to wait."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


WORK_TO_SHARE = 8e8
"""Multiply-adds per step from which a rank uses more than one thread. Below that, operations are so short that sharing
them costs more than it saves, on cores that a server's other processes use as well. On two cores, 20 steps of a tiny
Wan video, 64x64 and 5 frames (3e8), took 0.7 s with one thread and 1.3 s with two; four steps of a 64x64 image of the
bundled model (2e9) took 0.37 s and 0.27 s."""

TEXT_TOKENS = 512
PIXELS_PER_TOKEN = 16 * 16


def threads_for(weights: int, pixels: int, cores: int) -> int:
    """The number of threads with which a rank computes a job, given its transformers' number of `weights` and its share
    of its node's cores.

    It depends on nothing else: how threads share a sum decides its last bits, and so a pixel. The work is a rough
    estimate, each weight once per token: families have 256 to 512 text tokens, and one token per 16x16 pixels or more.
    A model whose denoiser has an unknown name counts zero weights, and is treated as large.
    """
    work = weights * (TEXT_TOKENS + pixels / PIXELS_PER_TOKEN)
    return 1 if 0 < work < WORK_TO_SHARE else max(1, cores)


@contextmanager
def cheap_imports() -> Iterator[None]:
    """Import without garbage collection, and exclude what was imported from later collections: of the 7 s of CPU that
    importing torch, diffusers and transformers takes, 2 are spent looking for garbage among objects that all stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def have_gloo_listen_on(address: str) -> None:
    """Set Gloo's interface to the one with this address, if any (none behind NAT), unless the user has set it.

    By default Gloo listens where the host's name resolves to, which on Debian is 127.0.1.1, even on a cluster.
    """
    for interface, addresses in psutil.net_if_addrs().items():
        if address in (each.address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def end_if_device_is_lost(device: torch.device) -> None:
    """End this process if its CUDA context is lost: after an illegal address, say, every further call fails with the
    same error as long as the process lives. The gang notices the end, and another process loads the model. Running out
    of memory is not such an error."""
    if device.type == "cpu":
        return
    import torch

    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        logger.exception("the device is lost to this process, which ends")
        os._exit(1)
