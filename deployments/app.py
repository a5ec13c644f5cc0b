"""`build(args)`: the whole graph in one place. The command line, `serve run` and KubeRay all start from here."""

# No `from __future__ import annotations` here: Serve validates the YAML's `args` against the annotation of `build`'s
# parameter only if that is a class, not its name.

from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from configs.server_args import ServerArgs
from deployments import log
from deployments.api.app import create_app
from deployments.api.keys import Keyring
from deployments.clients import EngineClient, StateClient, connect_engine
from deployments.engine.engine import Engine
from deployments.state.actor import renew_state_actor, state_actor

ENGINE_CPUS = 0.1
"""CPUs the engine replica reserves: it only waits for its ranks."""

DRAIN_SECONDS = 10.0
"""How long a replica that is being replaced may take to finish its job; a cluster's YAML sets its own value. A video
that loses its replica is computed again by the next one."""


class Ingress:
    """The HTTP side: FastAPI over the engine's handle and the state actor. Holds no state, imports no torch."""

    def __init__(self, args: ServerArgs, engine: DeploymentHandle, keyring: Keyring):
        log.configure(args, "ingress")
        self.args = args
        self.keyring = keyring
        self.engine = EngineClient(engine)
        self.state = StateClient(partial(state_actor, args, connect_engine))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self.args, self.engine, self.state, self.keyring, sends_request_id=False)


def build(args: ServerArgs) -> Application:
    """The Serve application: Ingress -> Engine (`dp_size` replicas), and the state actor beside them.

    API keys go no further: the rest of the server sees only their digests.
    """
    keyring = Keyring.read(args)
    args = settle(args)
    renew_state_actor(args, connect_engine)
    engine = serve.deployment(Engine, name="Engine", **engine_options(args)).bind(args)
    ingress = serve.deployment(serve.ingress()(Ingress), name="Ingress", **ingress_options())
    return ingress.bind(args, engine, keyring)


def settle(args: ServerArgs) -> ServerArgs:
    """Resolve what depends on this cluster: the device, and relative paths. API keys are removed."""
    device = args.device
    if device == "auto":
        device = "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
    local = {name: str(Path(path).absolute()) for name, path in _local_paths(args).items()}
    return args.model_copy(update={"device": device, "api_key": (), "admin_api_key": (), **local})


def _local_paths(args: ServerArgs) -> dict[str, str]:
    """The arguments that name something in the local file system, which a repo id or a URL does not."""
    paths = {"state_path": args.state_path}
    if "://" not in args.output_path:
        paths["output_path"] = args.output_path
    for name in ("model_path", "lora_path", "lora_dir"):
        value = getattr(args, name)
        if value is not None and Path(value).exists():
            paths[name] = value
    return paths


def ingress_options() -> dict[str, Any]:
    """Serve options of the Ingress: one replica on each node now alive, because only nodes with a replica have a proxy.
    It reserves no CPU, so that a node full of ranks has one too."""
    return {
        "num_replicas": sum(node["Alive"] for node in ray.nodes()),
        "max_replicas_per_node": 1,
        "max_ongoing_requests": 1000,
        "ray_actor_options": {"num_cpus": 0},
    }


def engine_options(args: ServerArgs) -> dict[str, Any]:
    """Serve options of the Engine: one bundle per rank; the replica itself lives in the first."""
    accelerator = {"GPU": 1} if args.device == "cuda" else {}
    rank = {"CPU": args.num_cpus_per_rank, **accelerator}
    bundles = [dict(rank) for _ in range(args.parallel.gang_size)]
    bundles[0]["CPU"] += ENGINE_CPUS
    return {
        "num_replicas": args.dp_size,
        # Everything that may wait here (this replica's images, and every video), plus other calls.
        "max_ongoing_requests": 2 * args.max_queue + 100,
        "ray_actor_options": {"num_cpus": ENGINE_CPUS},
        "placement_group_bundles": bundles,
        # Falls back to several nodes when no single one has room for the gang.
        "placement_group_strategy": "PACK",
        "health_check_period_s": 2,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": DRAIN_SECONDS,
        # Retrying does not remove the reason why a model cannot be loaded.
        "max_constructor_retry_count": 1,
    }
