"""HAProxy as Serve runs it for this server: the replica behind it notices when a client disconnects."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import pytest
import pytest_asyncio
from fastapi import FastAPI, Request
from ray import serve

from deployments.api.disconnect import cancelled_on_disconnect
from deployments.command.cluster import private_proxy_environment

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("ray_cluster")]

CLIENTS = 10
SECONDS_TO_NOTICE = 1.0

application = FastAPI()


@serve.deployment(max_ongoing_requests=10 * CLIENTS)
@serve.ingress(application)
class WaitingRoom:
    """Never responds, like a plain image call that is being computed: a request ends when its client disconnects."""

    def __init__(self) -> None:
        self.waiting: set[int] = set()

    @application.post("/wait/{client}")
    async def wait(self, client: int, request: Request) -> None:
        await request.body()
        self.waiting.add(client)
        try:
            async with cancelled_on_disconnect(request.receive):
                await asyncio.Event().wait()
        finally:
            self.waiting.remove(client)

    @application.get("/waiting")
    async def who_waits(self) -> list[int]:
        return sorted(self.waiting)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """HAProxy's port, with a `WaitingRoom` behind it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not pytest's folder: the path of a Unix socket has at most 107 characters.
    with TemporaryDirectory(prefix="ditserve-") as folder:
        environment = private_proxy_environment(folder)
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": port},
            controller_options={"runtime_env": {"env_vars": environment}},
        )
        serve.run(WaitingRoom.bind(), name="waiting-room", route_prefix="/")
        assert list(Path(folder).rglob("haproxy.cfg")), "Serve runs its Python proxy"
        yield port
        serve.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(port: int) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        deadline = time.monotonic() + 30
        while (await client.get("/waiting")).status_code != 200:
            assert time.monotonic() < deadline, "HAProxy does not know the replica"
            await asyncio.sleep(0.1)
        yield client


async def enter(port: int, client: int, body: bytes) -> asyncio.StreamWriter:
    """Send a request as most HTTP clients do: the headers, then the body separately."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    headers = f"POST /wait/{client} HTTP/1.1\r\nHost: server\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(headers.encode())
    await writer.drain()
    await asyncio.sleep(0.1)  # HAProxy has passed the headers on, and gets the body alone
    writer.write(body)
    await writer.drain()
    return writer


async def until_waiting(http: httpx2.AsyncClient, clients: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (still := (await http.get("/waiting")).json()) != clients:
        assert time.monotonic() < deadline, f"after {seconds} s there wait {still}"
        await asyncio.sleep(0.02)


# If HAProxy splices request bodies, all ten disconnects go unnoticed at each of the first two sizes.
@pytest.mark.parametrize("body_bytes", [100, 10_000, 1_000_000])
async def test_everyone_who_leaves_is_noticed_within_a_second(
    port: int, http: httpx2.AsyncClient, body_bytes: int
) -> None:
    writers = await asyncio.gather(*(enter(port, client, b"." * body_bytes) for client in range(CLIENTS)))
    await until_waiting(http, list(range(CLIENTS)), seconds=30)
    for writer in writers:
        writer.close()
    await until_waiting(http, [], SECONDS_TO_NOTICE)


async def test_who_stays_is_not_disturbed_by_who_leaves(port: int, http: httpx2.AsyncClient) -> None:
    staying, leaving = [await enter(port, client, b"{}") for client in range(2)]
    await until_waiting(http, [0, 1], seconds=30)
    leaving.close()
    await until_waiting(http, [0], SECONDS_TO_NOTICE)
    await asyncio.sleep(SECONDS_TO_NOTICE)
    await until_waiting(http, [0], seconds=0.5)
    staying.close()
    await until_waiting(http, [], SECONDS_TO_NOTICE)
