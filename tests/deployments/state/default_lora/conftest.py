from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.deployments.state.default_lora.replicas import Server


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    running = Server()
    await running.start(2)
    yield running
    for replica in running.replicas:
        await replica.die()
