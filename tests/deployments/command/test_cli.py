"""The command line's flags, refusals and printed configuration. What it serves is tested in tests/e2e."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from configs.server_args import ServerArgs
from deployments.command import cli
from deployments.command.cli import main, ready_line
from deployments.command.cluster import free_ports

DOCUMENTED_COMMAND = (
    "serve --text-encoder-cpu-offload --pin-cpu-memory --num-gpus 4 --ulysses-degree=2 --ring-degree=2 --port 30010"
)


def printed_config(capsys: pytest.CaptureFixture[str], *flags: str) -> dict:
    assert main(["serve", "--print-config", *flags]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_documented_command_prints_an_equivalent_config(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, *DOCUMENTED_COMMAND.split()[1:])
    assert config["http_options"]["port"] == 30010
    assert config["applications"][0]["args"] == {
        "num_gpus": 4,
        "ulysses_degree": 2,
        "ring_degree": 2,
        "text_encoder_cpu_offload": True,
    }
    ServeDeploySchema.model_validate(config)
    ServerArgs.model_validate(config["applications"][0]["args"])


def test_truth_values_are_bare_flags_or_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, "--vae-cpu-offload", "--pin-cpu-memory", "false", "--enable-torch-compile", "true")
    assert config["applications"][0]["args"] == {
        "vae_cpu_offload": True,
        "pin_cpu_memory": False,
        "enable_torch_compile": True,
    }


def test_a_flag_with_several_values_is_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, "--api-key", "one", "--api-key", "two", "--admin-api-key", "three")
    assert config["applications"][0]["args"] == {"api_key": ["one", "two"], "admin_api_key": ["three"]}


def test_the_printed_file_has_serve_log_as_the_command_line_does(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, "--log-format", "json", "--log-level", "debug", "--metrics-port", "9100")
    assert config["logging_config"] == {"log_level": "DEBUG", "encoding": "JSON", "enable_access_log": False}
    assert config["applications"][0]["args"] == {"log_format": "json", "log_level": "debug"}


def test_degrees_that_do_not_multiply_are_refused_with_the_equation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--num-gpus", "4", "--ulysses-degree", "3", "--ring-degree", "1"]) == 2
    assert (
        "num_gpus (4) must equal dp_size * cfg_degree * ulysses_degree * ring_degree (1 * 1 * 3 * 1 = 3)"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--port", "70000"], "--port: Input should be less than or equal to 65535"),
        (["--num-gpus", "0"], "--num-gpus: Input should be greater than or equal to 1"),
        (["--api-key", "two words"], "--api-key: String should match pattern"),
        (["--video-ttl", "0"], "--video-ttl: Input should be greater than 0"),
        (["--dit-cpu-offload", "--dit-layerwise-offload"], "exclude each other"),
        (
            ["--num-gpus", "2", "--ring-degree", "2", "--attention-backend", "fa"],
            "ring attention has a kernel of its own",
        ),
        (["--lora-scale", "nan"], "--lora-scale: Input should be a finite number"),
        (["--output-path", ""], "--output-path: String should have at least 1 character"),
    ],
)
def test_a_wrong_value_is_refused_by_its_flag(
    flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *flags]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--tp-size", "2"],
        ["--num-gpu", "2"],
        ["--num-gpus", "many"],
        ["--dtype", "fp8"],
        ["--vae-cpu-offload", "perhaps"],
    ],
)
def test_an_unknown_flag_or_value_ends_with_status_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["serve", *flags])
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("command", "shown", "hidden"),
    [
        ("serve", "Port the HTTP server listens on. (default: 30000)", "(default: None)"),
        ("generate", "--guidance-scale-2 VALUE", "Extension"),
    ],
)
def test_help_shows_what_a_user_can_do(
    capsys: pytest.CaptureFixture[str], command: str, shown: str, hidden: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert shown in text
    assert hidden not in text


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"ditserve {version('ditserve')}\n"


def test_a_key_is_not_repeated_by_its_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--api-key", "two words"]) == 2
    assert "two words" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ({"device": "cpu", "num_gpus": 4, "ulysses_degree": 2, "ring_degree": 2}, "4 CPU ranks over gloo"),
        ({"device": "cpu"}, "1 CPU rank"),
        ({"device": "cuda", "num_gpus": 8}, "8 GPUs over NCCL"),
        ({"device": "cuda"}, "1 GPU"),
    ],
)
def test_the_ready_line_says_what_computes(flags: dict[str, Any], ranks: str) -> None:
    line = ready_line(ServerArgs(**flags, port=30010))
    assert line == f"ditserve is ready on {ranks}: http://127.0.0.1:30010/v1 (API page: /docs)"


@pytest.fixture
def signalled_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], int]]:
    """The exit status of a server that gets a signal once it is ready, and again while it stops."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may themselves run under `nohup`

    def serve(number: int) -> int:
        @contextmanager
        def served(args: ServerArgs) -> Iterator[ServerArgs]:
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            yield args
            os.kill(os.getpid(), number)

        monkeypatch.setattr(cli, "served", served)
        return main(["serve"])

    yield serve
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)], ids=str)
def test_a_signal_ends_the_server_and_only_ctrl_c_hurries_when_it_comes_again(
    number: int, status: int, signalled_server: Callable[[int], int]
) -> None:
    assert signalled_server(number) == status


def test_a_server_outlives_its_terminal_under_nohup(signalled_server: Callable[[int], int]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signalled_server(signal.SIGTERM)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.e2e
def test_a_model_that_cannot_be_loaded_ends_the_server_with_the_reason(tmp_path: Path) -> None:
    """Even beside a cluster from somebody else's `ray start`, which it was not told to join."""
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    command = [sys.executable, "-m", "deployments.command.cli", "serve", "--port", str(*free_ports(1))]
    command += ["--model-path", str(tmp_path), "--state-path", str(tmp_path / "jobs.sqlite3")]
    with TemporaryDirectory(prefix="ray-") as folder:  # a socket's path has at most 107 characters
        Path(folder, "ray").mkdir()
        Path(folder, "ray", "ray_current_cluster").write_text("127.0.0.1:1")
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder}
        finished = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=False)
    assert finished.returncode == 1
    assert "NoSuchPipeline" in finished.stderr.splitlines()[-1]
    assert "Traceback" not in finished.stderr
