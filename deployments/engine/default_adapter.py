"""An engine replica follows the default adapter: it merges each new one, and reports to the state actor."""

from __future__ import annotations

import asyncio
import logging

from deployments.clients import StateClient
from deployments.engine.gang import Gang, GangBroken
from deployments.engine.turns import Turns
from deployments.errors import APIError
from deployments.interfaces import Composition
from deployments.state.propagation import Merged, follow

logger = logging.getLogger(__name__)


async def follow_default_adapter(state: StateClient, replica_id: str, gang: Gang, turns: Turns) -> None:
    """Merge each new default adapter as soon as the running job ends or gives way, and report to the state actor.

    A job would merge what it needs anyway, but this way `set_lora` fails early and the next job starts at once.
    """

    async def merge(composition: Composition) -> Merged:
        turns.make_way()  # `set_lora` waits for a step of a long video, not for all of it
        async with turns.gang_in_use:
            failure = None
            try:
                await turns.merge(composition)
            except GangBroken as broken:
                failure = str(broken)
                await turns.rebuild()
            except Exception as error:
                logger.exception("the default adapter cannot be merged")
                failure = str(error)
            return Merged(gang.composition, failure, await gang.lora_bytes_held())

    while True:
        try:
            await follow(state, replica_id, merge)
        except APIError as error:  # the state actor is restarting; `follow` then asks it afresh
            logger.info("the state actor does not answer: %s", error)
            await asyncio.sleep(1)
