"""What concerns a rank's process and not its jobs: threads, imports, the network, and when it had better end."""

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
"""How often a thread of libgomp looks for work before it sleeps: for a fraction of a millisecond, which is shorter than
its own default and longer than from one operation of a model to the next. A 256x256 picture of the bundled model, ten
steps on two cores, took 0.91 s (by default 1.07 s, with threads that sleep at once 1.39 s), and beside a process that
keeps a core busy 2.8 s (3.2 s, 1.4 s): a server has its cores to itself, or its user sets `OMP_WAIT_POLICY`."""


def have_threads_spin_briefly() -> None:
    """Set `SPIN_COUNT` for libgomp, which reads it when torch is imported, unless the user has said how to wait."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


WORK_TO_SHARE = 8e8
"""Multiply-adds of a step from which on a rank computes with more threads than one. Below it operations are so short
that to share them costs more than it saves, on cores that a server's other processes use as well. On two of them 20
steps of a tiny Wan's clip, 64x64 and 5 frames (3e8), took 0.7 s with one thread and 1.3 s with two; four of a 64x64
picture of the bundled model (2e9) 0.37 s and 0.27 s."""

TEXT_TOKENS = 512
PIXELS_PER_TOKEN = 16 * 16


def threads_for(weights: int, pixels: int, cores: int) -> int:
    """With how many threads a rank computes a job of a transformer with so many `weights`, given its share of its
    node's cores.

    It depends on nothing else: how sums are shared among threads decides their last bits, and so a pixel. The work is a
    rough one, each weight once for each token: families have 256 to 512 of text, and one for 16x16 pixels or more. A
    model that names its denoiser as no other does is known with no weights, and counts as a large one.
    """
    work = weights * (TEXT_TOKENS + pixels / PIXELS_PER_TOKEN)
    return 1 if 0 < work < WORK_TO_SHARE else max(1, cores)


@contextmanager
def cheap_imports() -> Iterator[None]:
    """Import without garbage collection, and leave what was imported out of later ones: of the 7 s of CPU that torch,
    diffusers and transformers take to import, 2 are spent looking for garbage among objects that all stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def have_gloo_listen_on(address: str) -> None:
    """Gloo is told an interface, if one has this address (behind NAT none has), unless the user has told it.

    By itself it listens where the host's name leads to, which on Debian is 127.0.1.1, also on a cluster.
    """
    for interface, addresses in psutil.net_if_addrs().items():
        if address in (each.address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def end_if_device_is_lost(device: torch.device) -> None:
    """End this process if its CUDA context is: after an illegal address, say, every further call gives that error again
    for as long as the process lives. The gang notices its end, and another process loads the model. To be out of memory
    is none of these errors."""
    if device.type == "cpu":
        return
    import torch

    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        logger.exception("the device is lost to this process, which ends")
        os._exit(1)
