from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.gang import Gang

# The suite tries the same examples each time, so that any failure comes from the change at hand. `make fuzz` searches
# for new failures with --hypothesis-profile=fuzz.
settings.register_profile("suite", max_examples=40, deadline=None, derandomize=True)
settings.register_profile("fuzz", max_examples=1000, deadline=None)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    """Four ranks over gloo. See `tests.gang`."""
    gang = Gang(tmp_path_factory.mktemp("gang"))
    yield gang
    gang.close()
