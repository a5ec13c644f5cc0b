"""Why a server does not start, as the command line reports it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from configs.server_args import ServerArgs
from deployments.command import preconditions
from deployments.command.cli import main
from deployments.command.cluster import free_ports
from deployments.command.preconditions import StartFailed, demand_resources
from deployments.state import database
from deployments.state.database import Database


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_a_taken_port_is_reported_before_anything_starts(taken_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", str(taken_port)]) == 1
    assert f"cannot listen on 127.0.0.1:{taken_port}: Address already in use" in capsys.readouterr().err


def test_a_state_of_another_server_is_reported_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(database, "_LOCK_TIMEOUT_S", 0.1)
    monkeypatch.setattr(preconditions, "SILENT_SECONDS", 0.1)
    path = str(tmp_path / "jobs.sqlite3")
    with closing(Database(path)):
        assert main(["serve", "--port", str(*free_ports(1)), "--state-path", path]) == 1
    said = capsys.readouterr()
    assert said.out == f"ditserve waits for '{path}', which another server has open\n"
    assert said.err == (
        f"ditserve: cannot keep the state: '{path}' is in use by another server: each needs a --state-path and an "
        "--output-path of its own\n"
    )


@pytest.mark.parametrize("flag", ["--state-path", "--output-path"])
def test_a_place_that_cannot_be_written_is_reported_before_anything_starts(
    tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    paths = {"--state-path": str(tmp_path / "jobs"), "--output-path": str(tmp_path / "outputs")}
    paths[flag] = str(tmp_path / "file" / "below")
    flags = [text for pair in paths.items() for text in pair]
    assert main(["serve", "--port", str(*free_ports(1)), *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ditserve: cannot keep the state: ")
    assert str(tmp_path / "file") in error


def test_an_output_path_of_no_known_kind_is_reported_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--state-path", str(tmp_path / "jobs"), "--output-path", "nowhere://pictures"]
    assert main(["serve", "--port", str(*free_ports(1)), *flags]) == 1
    assert "cannot keep the state: Protocol not known: nowhere" in capsys.readouterr().err


@pytest.mark.usefixtures("ray_cluster")
def test_ranks_that_the_cluster_has_no_gpus_for_are_refused_or_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    demand_resources(ServerArgs(device="cpu", num_gpus=4), may_come=False)
    args = ServerArgs(device="cuda", dp_size=2, num_gpus=4)
    with pytest.raises(StartFailed, match=r"^the ranks need 4 GPU \(there are 0\)$"):
        demand_resources(args, may_come=False)
    assert capsys.readouterr().out == ""
    demand_resources(args, may_come=True)
    assert capsys.readouterr().out == "ditserve waits for 4 GPU (there are 0)\n"
