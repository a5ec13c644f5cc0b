"""Ray and Serve around the application: start or join, deploy, stop."""

from __future__ import annotations

import logging
import os
import random
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partialmethod
from itertools import islice
from typing import Any

import psutil

from configs.server_args import ServerArgs
from deployments.errors import APIError
from deployments.preconditions import StartFailed, demand_no_serve, demand_port, demand_resources, demand_state

APPLICATION = "ditserve"
"""Name of the Serve application, by which the state actor finds the engine: there is one on a cluster."""

PROXY_ENVIRONMENT = {
    # HAProxy in front of the replicas: 0.9 ms a request against 3.9 ms through Serve's Python proxy.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Serve lets HAProxy 2.8 splice request bodies. After that HAProxy no longer reads from the client, and a plain call
    # goes on for one who has left: 36 of 40 leaves of an httpx client, which sends a body apart from its headers, went
    # unnoticed, 0 of 40 without splicing (which costs 0.6 ms of CPU per uploaded MB). Serve has no setting for it, but
    # copies the name of the balancing algorithm, by default `leastconn`, to the last line of HAProxy's `defaults`.
    "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "leastconn\nno option splice-request",
    # A proxy that died is replaced after three failed checks: in 3 s, where Serve takes 30.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # The replicas' own ports: Serve's default range starts at 30000, which is this server's.
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "31100",
    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": "31200",
    # By default an HAProxy ingress drains for 30 s and more before it stops.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
}


FRUGAL_ENVIRONMENT = {
    # No workers in reserve, and no record of every call for a dashboard that is not there (0.04 of a core when idle).
    "RAY_prestart_worker_first_driver": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Serve's controller looks around 4 times a second, not 10: 0.03 of a core less when idle, and no later start.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
    # No statistics of Ray's event loops, which each process updates 100 times a second for its debug log, and gauges of
    # the node every 30 s, not every 5: 0.02 of a core less when idle on four ranks (0.195 against 0.22).
    "RAY_event_stats": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "30000",
}
"""What Ray and Serve read when their processes start, unless the user has set it."""

AUTHENTICATION = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
"""How to speak to a cluster, where the user has settled it. Else one that is started here has a token of its own: Ray
would write one to the home folder, which containers may not have, and warn of it."""

UNUSED_RAY_PROCESSES = ("api_server", "monitor", "log_monitor")
"""What Ray starts beside its core with every cluster, and has no setting for: the dashboard (also where none is wanted,
for usage statistics), the autoscaler of a cluster that has one machine, and what copies the logs of workers to a driver
that does not want them. They take 180 MB and 4 s of CPU at each start: 8 s instead of 14 on two busy cores."""

PRIVATE_PORTS = range(20000, 30000)
"""Where a server's private ports are chosen from. Systems give those above (Linux: from 32768) to outgoing connections,
so that one found free might be taken when HAProxy comes to listen on it; Ray's workers have those below."""


@contextmanager
def served(args: ServerArgs) -> Iterator[ServerArgs]:
    """Deploy the application of `args` on the cluster at `RAY_ADDRESS`, or on one started here; undo it at the end.

    Gives the arguments with what was decided on that cluster: the device.

    Raises:
        StartFailed: a precondition does not hold, or the model cannot be loaded.
    """
    demand_port(args.host, args.port)
    joined = bool(os.environ.get("RAY_ADDRESS"))
    if not joined:  # else both are on the head node, and the state actor finds out
        demand_state(args)
    with (
        tempfile.TemporaryDirectory(prefix="ditserve-") as folder,
        nullcontext() if joined else _without_orphans(folder),
        _ray(args, private_proxy_environment(folder), joined),
        _application(args, joined) as settled,
    ):
        yield settled


@contextmanager
def _ray(args: ServerArgs, environment: Mapping[str, str], joined: bool) -> Iterator[None]:
    """Ray and Serve, of a cluster that was joined or of one that is started here with no more than is needed."""
    os.environ.update(environment)
    for name, value in FRUGAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not joined and not AUTHENTICATION & os.environ.keys():
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))

    import ray
    from ray import serve

    _start_less_of_ray()
    local_cluster = {
        "address": "local",  # else Ray joins one that `ray start` has left on this machine
        "num_cpus": _cpus_to_offer(args),
        "include_dashboard": False,
        "_metrics_export_port": args.metrics_port,
    }
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(log_to_driver=False, logging_level="warning", **({} if joined else local_cluster))
    except Exception as error:  # Ray raises just that when a machine is too busy to start it within 30 s
        raise StartFailed(f"Ray did not start: {error}") from error
    for number, handler in handlers.items():  # Ray has put its own in their place
        signal.signal(number, handler)
    try:
        if joined:
            demand_no_serve()
        serve.start(
            proxy_location="EveryNode" if joined else "HeadOnly",
            http_options=http_options(args),
            logging_config=logging_config(args),
            # A cluster started here has inherited it, and saves the 2 s that Ray takes to make runtime environments.
            controller_options={"runtime_env": {"env_vars": dict(environment)}} if joined else None,
        )
        yield
    finally:
        ray.shutdown()


@contextmanager
def _without_orphans(folder: str) -> Iterator[None]:
    """End, at the end, what still runs with files in `folder`: HAProxy, which would keep the port. A process of Ray's
    has started it, and is gone before it can end it where a signal goes to the whole process group, as `timeout` and
    supervisors send it."""
    try:
        yield
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if any(argument.startswith(folder) for argument in process.info["cmdline"] or ()):
                with suppress(psutil.NoSuchProcess):
                    process.kill()


@contextmanager
def _application(args: ServerArgs, joined: bool) -> Iterator[ServerArgs]:
    """The application, deployed and with the adapter of its start merged. A cluster that stays is left as it was."""
    import ray
    from ray import serve

    from deployments.app import build, settle
    from deployments.clients import connect_engine
    from deployments.losses import PROCESS_LOST, cause
    from deployments.state_actor import state_actor

    settled = settle(args)
    demand_resources(settled, may_come=joined)
    with ExitStack() as undo:
        if joined:
            undo.callback(_take_down)
        try:
            serve.run(build(args), name=APPLICATION, route_prefix="/")
            ray.get(state_actor(settled, connect_engine).adapters_open.remote())
        except RuntimeError as error:
            deployments = serve.status().applications[APPLICATION].deployments.values()
            raise StartFailed(_reason([str(error), *(deployment.message for deployment in deployments)])) from None
        except APIError as error:  # of Ray's making: its text is a traceback
            raise StartFailed(str(cause(error))) from None
        except PROCESS_LOST as error:  # the state actor can't live with its files
            raise StartFailed(_reason([str(error)])) from None
        yield settled


def _take_down() -> None:
    """The application, and the Serve that was started for it unless others use it now."""
    from ray import serve

    from deployments.state_actor import forget_state_actor

    forget_state_actor()  # it would ask for its videos again, and find no engine for them
    serve.delete(APPLICATION)
    forget_state_actor()  # a replica may have found it gone, and made another one
    if not serve.status().applications:
        serve.shutdown()


def _start_less_of_ray() -> None:
    """Have Ray leave out what it has no setting for."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    # Serve announces itself in three lines; the command line has one of its own.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    for process in UNUSED_RAY_PROCESSES:
        setattr(Node, f"start_{process}", _start_nothing)
    # Any free port for the agent on each node, whose own is 52365: Ray tries that for 3 s where it is taken, as it is
    # beside another server.
    RayParams.__init__ = partialmethod(RayParams.__init__, dashboard_agent_listen_port=0)


def _start_nothing(node: object, **settings: object) -> None:
    """In place of a method of Ray's `Node`."""


def http_options(args: ServerArgs) -> dict[str, Any]:
    """Where Serve's proxies listen. A picture may take minutes: no request is ended for its time."""
    return {"host": args.host, "port": args.port, "keep_alive_timeout_s": 90}


def logging_config(args: ServerArgs) -> dict[str, Any]:
    """How Serve's own processes log. The ingress has a log of requests of its own."""
    return {"log_level": args.log_level.upper(), "encoding": args.log_format.upper(), "enable_access_log": False}


def private_proxy_environment(folder: str) -> dict[str, str]:
    """`PROXY_ENVIRONMENT` for a server that shares its machine with others: all ports but the public one are chosen
    free, and HAProxy's files go to `folder`."""
    stats, metrics, fallback = free_ports(3)
    first_replica_port = 30100 + os.getpid() % 250 * 10
    return {
        **PROXY_ENVIRONMENT,
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_replica_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_replica_port + 100),
    }


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, and that the system gives to nobody by itself."""
    return list(islice(filter(_is_free, random.sample(PRIVATE_PORTS, len(PRIVATE_PORTS))), count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _cpus_to_offer(args: ServerArgs) -> int:
    """Logical CPUs of a cluster started here: the machine's, or more where the ranks ask for more."""
    return max(os.cpu_count() or 1, 2 + round(args.num_gpus * args.num_cpus_per_rank + args.dp_size))


def _reason(reports: list[str]) -> str:
    """The line that names the exception, in Serve's reports of a failed start: a traceback leads to it."""
    lines = [line.strip() for report in reports for line in report.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error: " in line), lines[0])
