import os
from collections.abc import Iterator

import pytest

os.environ["RAY_AUTH_MODE"] = "disabled"  # else Ray writes a token below HOME


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster for all tests of this folder."""
    import ray

    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="warning")
    yield
    ray.shutdown()
