"""`State` as an actor: one per cluster, named and detached, that outlives every replica and every update, and ends when
the application is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import ray
from ray.actor import ActorHandle
from ray.serve._private.common import REPLICA_ID_FULL_ID_STR_PREFIX
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from configs.server_args import ServerArgs
from deployments import log
from deployments.losses import PROCESS_LOST
from deployments.names import APPLICATION, NAMESPACE, STATE_ACTOR
from deployments.state.state import ServedEngine, State

logger = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
"""Interval between checks whether the application still exists."""

SETTINGS = (
    "model_path",
    "output_path",
    "state_path",
    "video_ttl",
    "storage_bytes",
    "max_queue",
    "max_retries",
    "lora_path",
    "lora_nickname",
    "lora_scale",
    "lora_switch",
    "lora_cache_bytes",
    "log_level",
    "log_format",
)
"""The arguments that the state actor reads."""


class StateProcess(State):
    """`State` in a process of its own."""

    def __init__(self, args: ServerArgs, engine: Callable[[], ServedEngine]):
        log.configure(args, "state")
        self._serve = running_serve()
        super().__init__(args, engine)
        if self._serve is not None:
            self._leaving = asyncio.create_task(self._leave_with_the_application())

    async def serves(self, args: ServerArgs) -> bool:
        """Whether it has the same settings as these arguments, and finds its engine in the Serve that runs now: a
        handle into a Serve that was shut down waits for replicas forever."""
        same = all(getattr(args, name) == getattr(self._args, name) for name in SETTINGS)
        return same and self._serve == running_serve()

    async def _leave_with_the_application(self) -> None:
        """End once the application is removed from the cluster: nobody calls any more, and the next server may keep its
        state in the same files. If it is called after all, another one is created."""
        deployed = True
        while deployed:
            await asyncio.sleep(LOOK_SECONDS)
            deployed = await asyncio.to_thread(is_deployed)
        logger.info("the application is gone")
        ray.kill(ray.get_runtime_context().current_actor)


def is_deployed() -> bool:
    """Whether the application has a replica on this cluster, even one that is starting or stopping. This takes a
    millisecond; `serve.status()` takes 40."""
    replicas = f"{REPLICA_ID_FULL_ID_STR_PREFIX}{APPLICATION}#"
    return any(actor["name"].startswith(replicas) for actor in ray.util.list_named_actors(all_namespaces=True))


def running_serve() -> str | None:
    """Which Serve runs on this cluster, if any: the id of its controller, which a restart does not change."""
    try:
        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)._actor_id.hex()
    except ValueError:
        return None


def state_actor(args: ServerArgs, engine: Callable[[], ServedEngine]) -> ActorHandle:
    """The state actor of this Ray cluster, created if there is none. It stays on the head node, where its files are."""
    options = {
        "name": STATE_ACTOR,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "resources": {"node:__internal_head__": 0.001},
        # Not in the placement group of the engine replica that may be the first to ask: it would end with that replica.
        "scheduling_strategy": "DEFAULT",
        "max_restarts": -1,
        # Calls that a crash interrupts are repeated, and clients do not notice: every method may be repeated. There is
        # a limit, because the call itself may be the cause.
        "max_task_retries": 3,
        "max_concurrency": 1000,
    }
    return ray.remote(**options)(StateProcess).remote(args, engine)


def renew_state_actor(args: ServerArgs, engine: Callable[[], ServedEngine]) -> None:
    """Replace a living state actor that has other arguments, or finds its engine in another Serve. It would otherwise
    stay as it is forever, since it outlives its replicas. What it knows is on disk."""
    with suppress(ValueError, *PROCESS_LOST):  # there is none, or it cannot work with its own arguments
        while not ray.get(ray.get_actor(STATE_ACTOR, namespace=NAMESPACE).serves.remote(args)):
            forget_state_actor()
            state_actor(args, engine)  # at once, before a replica with the old arguments asks for one


def forget_state_actor() -> None:
    """Kill the state actor, if there is one. What it knows is on disk; the next one continues with it."""
    with suppress(ValueError):
        ray.kill(ray.get_actor(STATE_ACTOR, namespace=NAMESPACE))
