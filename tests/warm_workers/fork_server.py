"""Forks Ray's workers from a process that has imported what ranks import: `fork_server.py SOCKET`.

See `sitecustomize.py`, the other end of the connection. Ends with its standard input, which is the test run's.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from contextlib import suppress
from importlib import import_module

IMPORTED = (
    "lora.load",
    "lora.merge",
    "lora.originals",
    "pipelines.generation.generation",
    "pipelines.model.load",
    "pipelines.parallel.mesh",
    "diffusers.pipelines.auto_pipeline",
    "transformers",
    "aiohttp",
    "fastapi",
    "opentelemetry.sdk.metrics",
    "prometheus_client",
    "uvicorn",
)
"""What ranks and Serve's replicas import, but for Ray, which reads a cluster's settings from the environment when it is
imported."""


def serve(path: str) -> None:
    """Fork a worker for each connection. Who asked for it and the worker end together."""
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as events:
        listener.bind(path)
        listener.listen()
        events.register(listener, selectors.EVENT_READ)
        events.register(sys.stdin, selectors.EVENT_READ)
        forks: dict[int, tuple[int, socket.socket]] = {}
        """By file descriptor of the process: its id, and the connection to who asked for it."""
        while True:
            # Deaths come last: until it is waited for, a dead worker's id is not another process's.
            for key, _ in sorted(events.select(), key=lambda event: event[0].data is None):
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    warm_up()
                    pid = os.fork()
                    if pid == 0:
                        events.close()
                        listener.close()
                        for handle, (_, others) in forks.items():
                            os.close(handle)
                            others.close()
                        become_a_worker(connection)
                    handle = os.pidfd_open(pid)
                    forks[handle] = pid, connection
                    events.register(handle, selectors.EVENT_READ)
                    events.register(connection, selectors.EVENT_READ, pid)
                elif key.data is not None:  # who asked was killed, and it was the worker that was meant
                    os.kill(key.data, signal.SIGKILL)
                    events.unregister(key.fileobj)
                else:
                    pid, connection = forks.pop(key.fd)
                    os.waitpid(pid, 0)
                    events.unregister(key.fd)
                    with suppress(KeyError):
                        events.unregister(connection)
                    os.close(key.fd)
                    connection.close()


def warm_up() -> None:
    """Import, the first time that a worker is wanted."""
    if "torch" not in sys.modules:
        gc.disable()
        for module in IMPORTED:
            import_module(module)
        gc.freeze()
        gc.enable()


def become_a_worker(connection: socket.socket) -> None:
    """Run what was asked for, as if it had been started by who asked."""
    text, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 20)
    request = json.loads(text)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    try:
        os.setpgid(0, request["group"])
    except PermissionError:  # of another session
        os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    connection.send(str(os.getpid()).encode())
    # The connection stays open for as long as this process lives.
    sys.argv = request["arguments"]
    sys.path[:1] = [os.path.dirname(sys.argv[0]), *os.environ["PYTHONPATH"].split(os.pathsep)]
    runpy.run_path(sys.argv[0], run_name="__main__")
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
