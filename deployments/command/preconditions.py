"""What must hold before the server starts, each with the reason that the user gets if it does not."""

from __future__ import annotations

import socket
import sqlite3
from collections import Counter

from configs.server_args import ServerArgs
from deployments.state.database import Database, StateInUse
from deployments.state.storage import Storage

START_KEY = "start"
"""Key of the file that tests whether outputs can be written."""

SILENT_SECONDS = 1.0
"""How long to wait silently for a state that is in use."""


class StartFailed(Exception):
    """The server cannot start; the message is the reason, for the user."""


def demand_port(host: str, port: int) -> None:
    """Raise `StartFailed` unless the port can be bound: Serve's proxies silently share a taken one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartFailed(f"cannot listen on {host}:{port}: {error.strerror}") from None


def demand_state(args: ServerArgs) -> None:
    """Raise `StartFailed` unless the state can be opened, by this server alone, and outputs can be written.

    A predecessor may still be shutting down; a message says that the server waits for it.
    """
    try:
        try:
            Database(args.state_path, patience_s=SILENT_SECONDS).close()
        except StateInUse:
            print(f"ditserve waits for '{args.state_path}', which another server has open", flush=True)
            Database(args.state_path).close()
        storage = Storage(args.output_path)
        storage.put(START_KEY, b"")
        storage.delete(START_KEY)
    except (OSError, RuntimeError, ImportError, ValueError, sqlite3.Error) as error:
        raise StartFailed(f"cannot keep the state: {error}") from None


def demand_no_serve() -> None:
    """Raise `StartFailed` if Serve already runs on the joined cluster: its port and environment were set when it
    started, and a second application of this name would replace the first."""
    from ray import serve

    there = serve.status()
    if there.applications or there.proxies:
        raise StartFailed(
            "Serve runs on this cluster already, with the port and the applications it has. To add or change a server"
            " there, run `serve deploy` with the YAML that --print-config prints; `serve shutdown` ends it."
        )


def demand_resources(args: ServerArgs, *, may_come: bool) -> None:
    """Raise `StartFailed` if the cluster has too few GPUs or CPUs for the engine, which would wait for them silently.
    If they `may_come`, with further nodes, print what the server waits for."""
    import ray

    from deployments.app import engine_options

    wanted = Counter[str]()
    for bundle in args.dp_size * engine_options(args)["placement_group_bundles"]:
        wanted.update(bundle)
    present = ray.cluster_resources()
    missing = [
        f"{amount:g} {kind} (there are {present.get(kind, 0):g})"
        for kind, amount in wanted.items()
        if amount > present.get(kind, 0)
    ]
    if missing and may_come:
        print(f"ditserve waits for {' and '.join(missing)}", flush=True)
    elif missing:
        raise StartFailed(f"the ranks need {' and '.join(missing)}")
