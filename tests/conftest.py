from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings

from tests.gang import Gang

# The suite tries the same examples each time, so that any failure comes from the change at hand. `make fuzz` searches
# for new failures with --hypothesis-profile=fuzz.
settings.register_profile("suite", max_examples=40, deadline=None, derandomize=True)
settings.register_profile("fuzz", max_examples=1000, deadline=None)
settings.load_profile("suite")

WARM_WORKERS = Path(__file__).with_name("warm_workers")

warm_workers = pytest.StashKey[tuple[subprocess.Popen[bytes], TemporaryDirectory[str]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Have Ray's workers be forks of a warm process; see `tests/warm_workers`."""
    if hasattr(config, "workerinput"):  # one of pytest-xdist's workers, which inherits the environment
        return
    folder = TemporaryDirectory(prefix="warm-workers-")
    path = f"{folder.name}/socket"
    command = [sys.executable, str(WARM_WORKERS / "fork_server.py"), path]
    # As the servers of the tests, it has no home folder.
    server = subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "HOME": os.devnull})
    config.stash[warm_workers] = server, folder
    os.environ["WARM_WORKERS"] = path
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(WARM_WORKERS), os.environ.get("PYTHONPATH"))))


def pytest_unconfigure(config: pytest.Config) -> None:
    if warm_workers in config.stash:
        server, folder = config.stash[warm_workers]
        server.communicate()  # closes its standard input, which ends it
        folder.cleanup()


SHARED = ("server", "four_ranks", "painter", "gang_of_two", "ray_cluster", "gang")
"""Fixtures that start processes for the tests of several files."""

LONGEST = ("server", "tests/chaos/test_chaos.py", "gang", "tests/e2e/test_two_nodes.py", "ray_cluster", "gang_of_two")
"""Groups that begin first, by a member, so that no worker is left alone with one of them at the end."""


def groups_of(items: list[pytest.Item]) -> dict[str, str]:
    """The group of each file. The tests of a group run in one worker, one after the other: those of a file, and of all
    files that need the same shared fixture. Each such fixture is then made once."""
    fixtures: dict[str, set[str]] = {}
    for item in items:
        fixtures.setdefault(file_of(item), set()).update({*SHARED} & {*getattr(item, "fixturenames", ())})
    names = {name: name for name in SHARED}
    for needed in fixtures.values():
        if needed:
            joined, *others = sorted({names[name] for name in needed}, key=SHARED.index)
            names = {name: joined if group in others else group for name, group in names.items()}
    return {file: names[min(needed)] if needed else file for file, needed in fixtures.items()}


def file_of(item: pytest.Item) -> str:
    return item.path.relative_to(item.config.rootpath).as_posix()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups, and before `-m` reads the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests for pytest-xdist, and within a group those that need the same mesh: it is made anew for each."""
    groups = groups_of(items)

    def place(item: pytest.Item) -> tuple[int, str]:
        group = groups[file_of(item)]
        first = LONGEST.index(group) if group in LONGEST else len(LONGEST)
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        return first, str(parameters.get("dims", "")) if group == "gang" else ""

    items.sort(key=place)
    for item in items:
        group = groups[file_of(item)]
        item.add_marker(pytest.mark.xdist_group(group))
        starts_processes = group in SHARED or item.path.is_relative_to(Path(__file__).with_name("e2e"))
        if starts_processes or item.get_closest_marker("e2e") or item.path.parent.name == "chaos":
            item.add_marker(pytest.mark.processes)


@pytest.fixture(scope="session")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    """Four ranks over gloo. See `tests.gang`."""
    gang = Gang(tmp_path_factory.mktemp("gang"))
    yield gang
    gang.close()
