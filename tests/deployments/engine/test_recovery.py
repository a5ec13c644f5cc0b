"""How often a gang is restarted before it is given up."""

from __future__ import annotations

import pytest

from deployments.engine import recovery
from deployments.engine.gang import GangBroken
from deployments.engine.recovery import MAX_FAILED_STARTS, Recovery

BROKEN = GangBroken("a rank died")
REFUSED = ValueError("there is no such model")


class ScriptedGang:
    """Fails to start with each of `failures` in turn, then starts."""

    def __init__(self, *failures: Exception):
        self.failures = list(failures)
        self.history: list[str] = []

    async def start(self) -> str:
        self.history.append("start")
        if self.failures:
            raise self.failures.pop(0)
        return "the model's card"

    def kill(self) -> None:
        self.history.append("kill")


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were requested; they take no time."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(recovery.asyncio, "sleep", sleep)
    return waited


async def test_a_first_gang_that_broke_is_tried_again(pauses: list[float]) -> None:
    gang = ScriptedGang(*[BROKEN] * (MAX_FAILED_STARTS - 1))
    assert await Recovery(gang).first_start() == "the model's card"
    assert gang.history == ["start", "kill", "start", "kill", "start"]
    assert pauses == [2, 4]


async def test_a_first_gang_that_breaks_each_time_is_given_up() -> None:
    gang = ScriptedGang(*[BROKEN] * 10)
    with pytest.raises(GangBroken, match="a rank died"):
        await Recovery(gang).first_start()
    assert gang.history == ["start", "kill"] * MAX_FAILED_STARTS


async def test_a_model_that_cannot_be_loaded_is_not_tried_again_at_first() -> None:
    gang = ScriptedGang(REFUSED)
    with pytest.raises(ValueError, match="no such model"):
        await Recovery(gang).first_start()
    assert gang.history == ["start"]


async def test_a_gang_is_rebuilt_until_it_is_there(pauses: list[float]) -> None:
    gang = ScriptedGang(BROKEN, REFUSED, *[BROKEN] * 4)
    healing = Recovery(gang)
    await healing.rebuild()
    assert gang.history == ["kill", "start"] * 7
    assert pauses == [2, 4, 8, 16, 30, 30]
    healing.check()


async def test_meanwhile_the_replica_is_unhealthy_once_it_failed_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    gang = ScriptedGang(*[BROKEN] * MAX_FAILED_STARTS)
    healing = Recovery(gang)
    complaints: list[str | None] = []

    async def look(seconds: float) -> None:
        try:
            healing.check()
            complaints.append(None)
        except RuntimeError as error:
            complaints.append(str(error))

    monkeypatch.setattr(recovery.asyncio, "sleep", look)
    await healing.rebuild()
    assert complaints == [None, None, "3 starts of the gang failed in a row"]
    healing.check()
