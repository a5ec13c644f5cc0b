from collections.abc import Iterator

import pytest

from tests.gang import Gang


@pytest.fixture(scope="session")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    """Four ranks over gloo. See `tests.gang`."""
    gang = Gang(tmp_path_factory.mktemp("gang"))
    yield gang
    gang.close()
