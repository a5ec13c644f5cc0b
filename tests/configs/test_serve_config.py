"""Serve and `ServerArgs` accept every key of `serve_config.yaml`, and it shows every argument."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.server_args import ServerArgs
from tests.configs.strict_schema import validate

REPOSITORY = Path(__file__).parents[2]

SET_ELSEWHERE = {"host", "port", "metrics_port", "sp_degree", "num_cpus_per_rank"}
"""Host and port are set in `http_options`, and the metrics port belongs to the cluster. The others repeat or fine-tune
arguments that are shown."""


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())


@pytest.fixture
def application(config: dict[str, Any]) -> dict[str, Any]:
    (only,) = config["applications"]
    return only


def test_serve_knows_every_key(config: dict[str, Any]) -> None:
    validate(config)


@pytest.mark.parametrize(
    ("place", "typo"),
    [
        (["http_options"], "prot"),
        (["applications", 0], "route_perfix"),
        (["applications", 0, "deployments", 1], "max_ongoing_request"),
        ([], "aplications"),
    ],
)
def test_a_misspelt_key_is_noticed(config: dict[str, Any], place: list[Any], typo: str) -> None:
    target: Any = config
    for step in place:
        target = target[step]
    target[typo] = 1
    with pytest.raises(ValueError, match=typo):
        validate(config)


def test_every_argument_is_one_of_the_server(application: dict[str, Any]) -> None:
    assert set(application["args"]) == set(ServerArgs.model_fields) - SET_ELSEWHERE


def test_the_arguments_shown_are_the_defaults(application: dict[str, Any]) -> None:
    assert ServerArgs.model_validate(application["args"]) == ServerArgs()


def test_the_address_is_that_of_the_command_line(config: dict[str, Any]) -> None:
    defaults = ServerArgs()
    assert config["http_options"]["host"] == defaults.host
    assert config["http_options"]["port"] == defaults.port


def test_the_replicas_ports_keep_clear_of_the_servers(config: dict[str, Any]) -> None:
    environment = config["controller_options"]["runtime_env"]["env_vars"]
    first = int(environment["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"])
    last = int(environment["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"])
    assert config["http_options"]["port"] not in range(first, last + 1)
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"


def test_the_graph_is_the_one_the_command_line_prints(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from deployments.command.cli import main

    assert main(["serve", "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    for key in ("name", "route_prefix", "import_path"):
        assert printed["applications"][0][key] == config["applications"][0][key]
    assert printed | {"applications": ()} == config | {"applications": ()}


def test_the_names_are_those_of_the_graph(application: dict[str, Any]) -> None:
    from deployments import app, names

    assert application["import_path"] == f"{app.__name__}:{app.build.__name__}"
    assert application["name"] == names.APPLICATION
    assert [deployment["name"] for deployment in application["deployments"]] == ["Ingress", "Engine"]


def test_serve_can_see_that_the_arguments_are_server_args() -> None:
    from deployments.app import build

    (parameter,) = inspect.signature(build).parameters.values()
    assert parameter.annotation is ServerArgs


def test_what_serve_is_told_of_the_engine_is_what_the_application_says_itself(application: dict[str, Any]) -> None:
    from deployments.app import engine_options

    engine = next(deployment for deployment in application["deployments"] if deployment["name"] == "Engine")
    options = engine_options(ServerArgs(device="cpu"))
    assert {name: options[name] for name in engine if name != "name"} == {
        name: value for name, value in engine.items() if name != "name"
    }
