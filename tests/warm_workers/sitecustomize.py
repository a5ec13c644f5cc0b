"""Ray's workers as forks of one warm process. Python executes this at the start of each process of the tests.

A worker that Ray starts would import torch, diffusers and transformers for 4 to 7 s of CPU when it becomes a rank, and
the tests start some 80 ranks. So a process that is about to become a worker has `fork_server.py` fork one instead, with
its own arguments, environment, folder, process group and output. It then stands by as long as the fork lives, under the
name `forked PID`, which is how `tests.e2e.server` finds the fork: its environment, as the system shows it, is the fork
server's.
"""

import os
import sys

SOCKET = "WARM_WORKERS"
"""Environment variable with the fork server's socket. Without it, workers start cold."""

WORKER = "default_worker.py"
"""The script that Ray's workers run."""


def become_a_fork(path: str, script: str) -> None:
    import ctypes
    import json
    import socket

    request = {
        "arguments": sys.orig_argv[sys.orig_argv.index(script) :],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "group": os.getpgrp(),
    }
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
        pid = server.recv(16).decode()
        ctypes.CDLL(None).prctl(15, f"forked {pid}".encode())  # PR_SET_NAME
        server.recv(1)  # nothing comes, until the fork's death closes the connection
    os._exit(0)


if SOCKET in os.environ:
    # Ray may give this script to another one, which prepares its environment and then executes it.
    command = [argument for argument in sys.orig_argv[1:] if not argument.startswith("-")]
    if command and os.path.basename(command[0]) == WORKER:
        become_a_fork(os.environ[SOCKET], command[0])
