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
from deployments.command.preconditions import StartFailed, demand_no_serve, demand_port, demand_resources, demand_state
from deployments.errors import APIError
from deployments.names import APPLICATION

PROXY_ENVIRONMENT = {
    # HAProxy in front of the replicas: 0.9 ms per request instead of 3.9 ms through Serve's Python proxy.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Serve lets HAProxy 2.8 splice request bodies. HAProxy then no longer reads from the client, and a plain call
    # continues after its client disconnects: 36 of 40 disconnects of an httpx client, which sends a body apart from its
    # headers, went unnoticed; without splicing, 0 of 40 (at a cost of 0.6 ms of CPU per uploaded MB). Serve has no
    # setting for this, but copies the name of the balancing algorithm, by default `leastconn`, to the last line of
    # HAProxy's `defaults`.
    "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "leastconn\nno option splice-request",
    # A dead proxy is replaced after three failed checks: in 3 s instead of Serve's 30.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # The replicas' own ports: Serve's default range starts at 30000, which is this server's port.
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "31100",
    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": "31200",
    # By default an HAProxy ingress drains for at least 30 s before it stops.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
}


FRUGAL_ENVIRONMENT = {
    # No workers in reserve, and no record of every call for a dashboard that does not run (0.04 of a core when idle).
    "RAY_prestart_worker_first_driver": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Serve's controller loops 4 times a second, not 10: 0.03 of a core less when idle, and no slower startup.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
    # No statistics of Ray's event loops, which each process updates 100 times a second for its debug log, and node
    # gauges every 30 s, not every 5: 0.02 of a core less when idle on four ranks (0.195 instead of 0.22).
    "RAY_event_stats": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "30000",
}
"""Variables that Ray and Serve read when their processes start. The user's own values take precedence."""

AUTHENTICATION = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
"""Variables with which a user configures authentication to a cluster. If none is set, a cluster started here gets its
own token: Ray would write one to the home folder, which containers may not have, and warn about it."""

UNUSED_RAY_PROCESSES = ("api_server", "monitor", "log_monitor")
"""Processes that Ray starts with every cluster and has no setting to omit: the dashboard (even when disabled, for usage
statistics), the autoscaler of a one-machine cluster, and the one that copies worker logs to a driver that does not want
them. They take 180 MB, and 4 s of CPU per start: without them a start takes 8 s instead of 14 on two busy cores."""

PRIVATE_PORTS = range(20000, 30000)
"""A server's private ports are chosen from these. Systems give higher ports (Linux: from 32768) to outgoing
connections, so one found free might be taken by the time HAProxy listens on it; Ray's workers use lower ones."""


@contextmanager
def served(args: ServerArgs) -> Iterator[ServerArgs]:
    """Deploy the application of `args` on the cluster at `RAY_ADDRESS`, or on one started here; undo that on exit.

    Yields the arguments as settled for that cluster, with the device resolved.

    Raises:
        StartFailed: a precondition does not hold, or the model cannot be loaded.
    """
    demand_port(args.host, args.port)
    joined = bool(os.environ.get("RAY_ADDRESS"))
    if not joined:  # else state and outputs are on the head node, and the state actor checks them
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
    """Run Ray and Serve: join a cluster, or start one here with no more than is needed."""
    os.environ.update(environment)
    for name, value in FRUGAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not joined and not AUTHENTICATION & os.environ.keys():
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))

    import ray
    from ray import serve

    _start_less_of_ray()
    local_cluster = {
        "address": "local",  # else Ray joins a cluster that `ray start` has left on this machine
        "num_cpus": _cpus_to_offer(args),
        "include_dashboard": False,
        "_metrics_export_port": args.metrics_port,
    }
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(log_to_driver=False, logging_level="warning", **({} if joined else local_cluster))
    except Exception as error:  # Ray raises a bare Exception when the machine is too busy to start it within 30 s
        raise StartFailed(f"Ray did not start: {error}") from error
    for number, handler in handlers.items():  # Ray has replaced them with its own
        signal.signal(number, handler)
    try:
        if joined:
            demand_no_serve()
        serve.start(
            proxy_location="EveryNode" if joined else "HeadOnly",
            http_options=http_options(args),
            logging_config=logging_config(args),
            # A cluster started here inherits it, which saves the 2 s that Ray takes to create runtime environments.
            controller_options={"runtime_env": {"env_vars": dict(environment)}} if joined else None,
        )
        yield
    finally:
        ray.shutdown()


@contextmanager
def _without_orphans(folder: str) -> Iterator[None]:
    """On exit, kill what still runs with files in `folder`: HAProxy, which would keep the port. The Ray process that
    started it dies before it can stop it when a signal goes to the whole process group, as `timeout` and supervisors
    send it."""
    try:
        yield
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if any(argument.startswith(folder) for argument in process.info["cmdline"] or ()):
                with suppress(psutil.NoSuchProcess):
                    process.kill()


@contextmanager
def _application(args: ServerArgs, joined: bool) -> Iterator[ServerArgs]:
    """Deploy the application and merge its startup adapter. On exit, a joined cluster is left as it was found."""
    import ray
    from ray import serve

    from deployments.app import build, settle
    from deployments.clients import connect_engine
    from deployments.losses import PROCESS_LOST, cause
    from deployments.state.actor import state_actor

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
        except APIError as error:  # raised by Ray's own subclass, whose text is a traceback
            raise StartFailed(str(cause(error))) from None
        except PROCESS_LOST as error:  # the state actor cannot work with its files
            raise StartFailed(_reason([str(error)])) from None
        yield settled


def _take_down() -> None:
    """Delete the application, and shut down the Serve started for it unless others use it now."""
    from ray import serve

    from deployments.state.actor import forget_state_actor

    forget_state_actor()  # else it would request its videos again, and find no engine for them
    serve.delete(APPLICATION)
    forget_state_actor()  # a replica may have found it gone, and created another one
    if not serve.status().applications:
        serve.shutdown()


def _start_less_of_ray() -> None:
    """Keep Ray from starting what it has no setting to omit."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    # Serve announces itself in three lines; the command line prints one of its own.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    for process in UNUSED_RAY_PROCESSES:
        setattr(Node, f"start_{process}", _start_nothing)
    # Any free port for each node's agent. Its default is 52365, which Ray retries for 3 s when it is taken, as it is
    # beside another server.
    RayParams.__init__ = partialmethod(RayParams.__init__, dashboard_agent_listen_port=0)


def _start_nothing(node: object, **settings: object) -> None:
    """Replaces a method of Ray's `Node`."""


def http_options(args: ServerArgs) -> dict[str, Any]:
    """Where Serve's proxies listen. An image may take minutes, so requests have no timeout."""
    return {"host": args.host, "port": args.port, "keep_alive_timeout_s": 90}


def logging_config(args: ServerArgs) -> dict[str, Any]:
    """How Serve's own processes log. The ingress logs requests itself."""
    return {"log_level": args.log_level.upper(), "encoding": args.log_format.upper(), "enable_access_log": False}


def private_proxy_environment(folder: str) -> dict[str, str]:
    """`PROXY_ENVIRONMENT` for a server that shares its machine with others: three ports are chosen free, the replicas'
    range depends on the process id, and HAProxy's files go to `folder`."""
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
    """Ports that nobody listens on, and that the system does not assign by itself."""
    return list(islice(filter(_is_free, random.sample(PRIVATE_PORTS, len(PRIVATE_PORTS))), count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _cpus_to_offer(args: ServerArgs) -> int:
    """Logical CPUs of a cluster started here: the machine's, or more if the ranks request more."""
    return max(os.cpu_count() or 1, 2 + round(args.num_gpus * args.num_cpus_per_rank + args.dp_size))


def _reason(reports: list[str]) -> str:
    """The line that names the exception in Serve's reports of a failed start, where it ends a traceback."""
    lines = [line.strip() for report in reports for line in report.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error: " in line), lines[0])
