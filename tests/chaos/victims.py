"""The processes of a running server by what they do, and how to lose one."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from contextlib import suppress

import psutil

from tests.e2e.server import Server

VICTIMS: Mapping[str, Callable[[str, str], bool]] = {
    "rank": lambda title, name: title.startswith("ray::Rank"),
    "hung rank": lambda title, name: title.startswith("ray::Rank"),
    "engine replica": lambda title, name: title.startswith("ray::ServeReplica:ditserve:Engine"),
    "ingress replica": lambda title, name: title.startswith("ray::ServeReplica:ditserve:Ingress"),
    "state actor": lambda title, name: title.startswith("ray::State"),
    "proxy": lambda title, name: name == "haproxy",
}
"""How to recognise a process of each kind by its title (Ray names its workers after their actor) and its name."""


def lose(server: Server, kind: str) -> bool:
    """Kill a process of this kind, or stop it for good if it is to hang. False if there is none right now."""
    for process in server.processes():
        with suppress(psutil.Error):
            if VICTIMS[kind](" ".join(process.cmdline()), process.name()):
                process.send_signal(signal.SIGSTOP if kind == "hung rank" else signal.SIGKILL)
                return True
    return False
