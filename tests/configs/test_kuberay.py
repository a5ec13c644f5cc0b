"""The KubeRay manifests, as far as they can be checked without Kubernetes: names, ports, volumes and times agree."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from configs.server_args import ServerArgs
from deployments.command.cluster import PROXY_ENVIRONMENT
from tests.configs.strict_schema import validate

REPOSITORY = Path(__file__).parents[2]
KUBERAY = REPOSITORY / "configs" / "kuberay"


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((KUBERAY / name).read_text())


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return load("rayservice.yaml")["spec"]


@pytest.fixture(scope="module")
def cluster(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["rayClusterConfig"]


@pytest.fixture(scope="module")
def head(cluster: dict[str, Any]) -> dict[str, Any]:
    return cluster["headGroupSpec"]["template"]["spec"]


@pytest.fixture(scope="module")
def worker_group(cluster: dict[str, Any]) -> dict[str, Any]:
    (only,) = cluster["workerGroupSpecs"]
    return only


@pytest.fixture(scope="module")
def worker(worker_group: dict[str, Any]) -> dict[str, Any]:
    return worker_group["template"]["spec"]


@pytest.fixture(scope="module")
def pods(head: dict[str, Any], worker: dict[str, Any]) -> list[dict[str, Any]]:
    return [head, worker]


@pytest.fixture(scope="module")
def serve_config(spec: dict[str, Any]) -> dict[str, Any]:
    return yaml.safe_load(spec["serveConfigV2"])


@pytest.fixture(scope="module")
def application(serve_config: dict[str, Any]) -> dict[str, Any]:
    (only,) = serve_config["applications"]
    return only


@pytest.fixture(scope="module")
def engine(application: dict[str, Any]) -> dict[str, Any]:
    return next(deployment for deployment in application["deployments"] if deployment["name"] == "Engine")


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["containers"]
    return only


def environment(pod: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(pod)["env"] if "value" in entry}


def test_it_is_a_ray_service_of_the_stored_version() -> None:
    manifest = load("rayservice.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")


def test_serve_knows_every_key_of_the_inner_config(serve_config: dict[str, Any]) -> None:
    validate(serve_config)


def test_the_server_takes_its_arguments(application: dict[str, Any]) -> None:
    assert set(application["args"]) <= set(ServerArgs.model_fields)
    ServerArgs.model_validate(application["args"])


def test_the_graph_is_that_of_serve_config_yaml(application: dict[str, Any]) -> None:
    (alone,) = yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())["applications"]
    for key in ("name", "route_prefix", "import_path"):
        assert application[key] == alone[key]
    assert [d["name"] for d in application["deployments"]] == [d["name"] for d in alone["deployments"]]


def test_ray_is_the_version_that_is_tested(cluster: dict[str, Any]) -> None:
    assert f"ray=={cluster['rayVersion']}\n" in (REPOSITORY / ".ci" / "constraints.txt").read_text()


def test_every_pod_has_serves_port_under_the_name_kuberay_looks_for(
    pods: list[dict[str, Any]], serve_config: dict[str, Any]
) -> None:
    for pod in pods:
        ports = {port["name"]: port["containerPort"] for port in container(pod)["ports"]}
        assert ports["serve"] == serve_config["http_options"]["port"]


def test_the_server_listens_beyond_its_pod(serve_config: dict[str, Any]) -> None:
    assert serve_config["http_options"]["host"] == "0.0.0.0"
    assert serve_config["proxy_location"] == "EveryNode"


def test_every_pod_runs_haproxy_clear_of_the_servers_port(
    pods: list[dict[str, Any]], serve_config: dict[str, Any]
) -> None:
    for pod in pods:
        variables = environment(pod)
        for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"):
            assert variables[name] == PROXY_ENVIRONMENT[name]
        first = int(variables["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"])
        last = int(variables["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"])
        assert serve_config["http_options"]["port"] not in range(first, last + 1)


def test_a_worker_has_the_gpus_of_one_replica(application: dict[str, Any], worker: dict[str, Any]) -> None:
    gang_size = ServerArgs.model_validate(application["args"]).parallel.gang_size
    assert container(worker)["resources"]["limits"]["nvidia.com/gpu"] == gang_size


def test_the_device_does_not_depend_on_when_the_workers_come(application: dict[str, Any]) -> None:
    assert application["args"]["device"] == "cuda"


def test_there_may_be_a_worker_for_every_replica(engine: dict[str, Any], worker_group: dict[str, Any]) -> None:
    scaling = engine["autoscaling_config"]
    assert worker_group["minReplicas"] == scaling["min_replicas"]
    assert worker_group["maxReplicas"] == scaling["max_replicas"]
    assert worker_group["minReplicas"] <= worker_group["replicas"] <= worker_group["maxReplicas"]


def test_the_head_computes_nothing(cluster: dict[str, Any], head: dict[str, Any]) -> None:
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in container(head)["resources"]["limits"]


@pytest.mark.parametrize("argument", ["state_path", "output_path"])
def test_what_must_last_lies_on_the_heads_claim(
    argument: str, application: dict[str, Any], head: dict[str, Any]
) -> None:
    path = PurePosixPath(application["args"][argument])
    volumes = {volume["name"]: volume for volume in head["volumes"]}
    mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container(head)["volumeMounts"]}
    volume = next(volume for folder, volume in mounted.items() if path.is_relative_to(folder))
    claim = load("state-claim.yaml")
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_every_mount_has_its_volume_and_shared_memory_is_memory(pods: list[dict[str, Any]]) -> None:
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container(pod)["volumeMounts"]}
        assert set(mounts.values()) == set(volumes)
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_draining_takes_longer_than_the_longest_job(
    spec: dict[str, Any],
    serve_config: dict[str, Any],
    application: dict[str, Any],
    engine: dict[str, Any],
    pods: list[dict[str, Any]],
    worker: dict[str, Any],
) -> None:
    longest_job = serve_config["http_options"]["request_timeout_s"]
    for deployment in application["deployments"]:
        assert deployment["graceful_shutdown_timeout_s"] >= longest_job
    for pod in pods:
        assert int(environment(pod)["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) >= longest_job
    assert worker["terminationGracePeriodSeconds"] > engine["graceful_shutdown_timeout_s"]
    assert spec["rayClusterDeletionDelaySeconds"] > engine["graceful_shutdown_timeout_s"]


def test_a_worker_that_must_go_drains_until_its_grace_ends(worker: dict[str, Any]) -> None:
    *_, script = container(worker)["lifecycle"]["preStop"]["exec"]["command"]
    local = REPOSITORY / PurePosixPath(script).relative_to(image_folder())
    deadline = re.search(r"^DEADLINE_SECONDS=(\d+)$", local.read_text(), re.MULTILINE)
    assert deadline is not None
    assert int(deadline[1]) == worker["terminationGracePeriodSeconds"]


def test_a_second_cluster_never_opens_the_same_database(spec: dict[str, Any]) -> None:
    assert spec["upgradeStrategy"]["type"] == "None"  # a string: YAML's null is `null`
    assert load("state-claim.yaml")["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_submitting_work_to_ray_takes_a_token(cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"]["mode"] == "token"


def test_the_fault_tolerance_patch_adds_to_the_cluster_and_replaces_nothing(cluster: dict[str, Any]) -> None:
    patch = load("gcs-fault-tolerance.yaml")["spec"]["rayClusterConfig"]
    assert patch["gcsFaultToleranceOptions"]["backend"] == "redis"
    assert not set(patch) & set(cluster)


def test_the_image_has_what_kuberays_probes_call() -> None:
    dockerfile = (KUBERAY / "Dockerfile").read_text()
    assert "wget" in dockerfile
    assert "FROM python:3.11" in dockerfile


def image_folder() -> str:
    folder = re.search(r"^WORKDIR (\S+)$", (KUBERAY / "Dockerfile").read_text(), re.MULTILINE)
    assert folder is not None
    return folder[1]
