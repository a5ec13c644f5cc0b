"""What a browser lets other sites' pages do with the server (CORS): nothing, unless a flag allows their origin."""

from __future__ import annotations

import httpx2
import pytest
from pydantic import ValidationError

from configs.server_args import ServerArgs
from deployments.api.app import create_app
from pipelines.job import Task
from tests.deployments.api.stand_in import StandInEngine, StandInState

ORIGIN = "https://app.example.org"
OTHER = "https://elsewhere.example.org"


def browser(*allowed: str, origin: str = ORIGIN) -> httpx2.AsyncClient:
    """A browser on a page from `origin`."""
    app = create_app(ServerArgs(allowed_origin=allowed), StandInEngine(Task.TEXT_TO_IMAGE), StandInState())
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test", headers={"origin": origin})


async def may_post(client: httpx2.AsyncClient) -> bool:
    """Whether the server passes the preflight of a browser, sent before any request that a form could not make."""
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    answer = await client.options("/v1/images/generations", headers=asked)
    allowed = answer.headers.get("access-control-allow-headers", "").lower()
    return answer.status_code == 200 and "authorization" in allowed and shows(answer, client.headers["origin"])


def shows(answer: httpx2.Response, origin: str) -> bool:
    return answer.headers.get("access-control-allow-origin") in (origin, "*")


@pytest.mark.parametrize("allowed", [ORIGIN, "*"])
async def test_pages_of_an_allowed_origin_read_every_answer(allowed: str) -> None:
    async with browser(OTHER, allowed) as client:
        assert await may_post(client)
        wrong = await client.post("/v1/images/generations", json={})
        assert wrong.status_code == 400
        for answer in (wrong, await client.get("/health"), await client.get("/nowhere")):
            assert shows(answer, ORIGIN)
            assert answer.headers["access-control-expose-headers"] == "*"  # x-request-id, retry-after …


@pytest.mark.parametrize("allowed", [(), (OTHER,)])
async def test_pages_of_other_origins_read_none(allowed: tuple[str, ...]) -> None:
    async with browser(*allowed) as client:
        assert not await may_post(client)
        assert not shows(await client.get("/health"), ORIGIN)


@pytest.mark.parametrize("origin", ["app.example.org", "https://app.example.org/", "https://app.example.org/page", ""])
def test_what_no_browser_calls_an_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match="allowed_origin"):
        ServerArgs(allowed_origin=origin)
