from collections.abc import Iterator

import pytest

from tests.e2e.server import Server, running_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundled model on one rank, for all tests that leave no trace in it."""
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running
