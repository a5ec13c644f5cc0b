from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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


GROUPS = {
    "tests/e2e/test_queue.py": "gang_of_two",
    "tests/e2e/test_lora_two_experts.py": "gang_of_two",
    "tests/e2e/test_two_nodes.py": "two_nodes",
    "tests/e2e/test_guards.py": "guards",
    "tests/e2e": "server",
    "tests/chaos": "chaos",
    "tests/pipelines/parallel": "gang",
    "tests/deployments/command/test_preconditions.py": "ray_cluster",
    "tests/deployments/command/test_proxy.py": "ray_cluster",
    "tests/deployments/engine/gang": "ray_cluster",
    "tests/deployments/state/state/test_failures.py": "ray_cluster",
    "tests/deployments/state/test_actor.py": "ray_cluster",
    "tests/deployments/test_app.py": "ray_cluster",
}
"""Files and folders whose tests share what takes long to start, with the group that they run in: a group runs in one of
pytest-xdist's workers, one test after the other. The first that fits counts; any other file is a group of its own."""

LONGEST = ("server", "chaos", "gang", "two_nodes", "ray_cluster", "gang_of_two", "guards")
"""Groups that begin first, so that no worker is left alone with one of them at the end."""


def group_of(nodeid: str) -> str:
    file = nodeid.split("::")[0]
    return next((group for path, group in GROUPS.items() if file == path or file.startswith(f"{path}/")), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By group. xdist's own `--dist loadgroup` writes the group into a test's id, which pytest 9.2 does not let it."""
    from xdist.scheduler import LoadScopeScheduling

    class LoadGroups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return LoadGroups(config, log)


@pytest.hookimpl(tryfirst=True)  # before `-m` reads the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest groups first, and within the gang's those that need the same mesh together: it is made anew for each."""

    def place(item: pytest.Item) -> tuple[int, str]:
        group = group_of(item.nodeid)
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        mesh = str(parameters.get("dims", "")) if group == "gang" else ""
        return LONGEST.index(group) if group in LONGEST else len(LONGEST), mesh

    items.sort(key=place)
    for item in items:
        if group_of(item.nodeid) in LONGEST or item.get_closest_marker("e2e"):
            item.add_marker(pytest.mark.processes)


@pytest.fixture(scope="session")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    """Four ranks over gloo. See `tests.gang`."""
    gang = Gang(tmp_path_factory.mktemp("gang"))
    yield gang
    gang.close()
