"""Images by URL: which addresses the server connects to, and what it may fetch. Real sockets on loopback addresses:
127.0.0.1 counts as public and 127.0.0.2 as private."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import httpx2
import pytest
from aiohttp import web

from configs.server_args import ServerArgs
from deployments.api import remote_media
from deployments.api.app import create_app
from deployments.api.remote_media import fetch, is_public
from deployments.errors import APIError
from pipelines.job import Task
from tests.deployments.api.stand_in import StandInEngine, StandInState
from tests.e2e.pictures import picture

PUBLIC, PRIVATE = "127.0.0.1", "127.0.0.2"


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "172.15.255.255", "2606:4700:4700::1111", "2a00:1450::1"])
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
        # IPv4 addresses written as IPv6: mapped, compatible, NAT64, 6to4, Teredo.
        *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1"),
        *("2002:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2"),
    ],
)
def test_any_other_address_is_not(address: str) -> None:
    assert not is_public(address)


@dataclass
class Site:
    """A web server on both addresses."""

    port: int
    asked: list[str] = field(default_factory=list)
    """`address/path` of each request."""
    headers: dict[str, str] = field(default_factory=dict)
    """Of the last request."""

    def url(self, path: str = "/picture", host: str = PUBLIC) -> str:
        return f"http://{host}:{self.port}{path}"


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async def answer(request: web.Request) -> web.StreamResponse:
        address = request.transport.get_extra_info("sockname")[0]
        site.asked.append(f"{address}{request.path}")
        site.headers = dict(request.headers)
        match request.path:
            case "/picture":
                return web.Response(body=picture(), content_type="text/html")
            case "/text":
                return web.Response(text="no picture", content_type="image/png")
            case "/redirect":
                raise web.HTTPFound(request.query["to"])
            case "/endless":
                response = web.StreamResponse()
                await response.prepare(request)
                while True:
                    await response.write(bytes(10_000))
            case "/gzip":
                return web.Response(body=picture(), headers={"Content-Encoding": "gzip"})
            case "/slow":
                await asyncio.sleep(30)
        raise web.HTTPNotFound

    application = web.Application()
    application.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(application, handler_cancellation=True)
    await runner.setup()
    first = web.TCPSite(runner, PUBLIC, 0)
    await first.start()
    site = Site(runner.addresses[0][1])
    await web.TCPSite(runner, PRIVATE, site.port).start()
    yield site
    await runner.cleanup()


@pytest.fixture
def one_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_media, "is_public", lambda address: address == PUBLIC)


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make every host resolve to the first list of addresses, next time to the second, and so on, up to the last."""

    def use(*answers: list[str]) -> None:
        remaining = list(answers)

        async def getaddrinfo(self, host, port, **_):
            addresses = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", getaddrinfo)

    return use


async def refusal(url: str, max_bytes: int = 10**6) -> APIError:
    with pytest.raises(APIError) as error:
        await fetch(url, "image", max_bytes)
    assert error.value.param == "image"
    return error.value


@pytest.mark.usefixtures("one_is_public")
class TestWhatIsFetched:
    async def test_is_the_picture_and_nothing_of_the_server_is_sent_along(self, site: Site, monkeypatch) -> None:
        monkeypatch.setenv("HTTP_PROXY", f"http://{PRIVATE}:{site.port}")
        assert await fetch(site.url(), "image", 10**6) == picture()
        assert site.asked == [f"{PUBLIC}/picture"]
        assert set(site.headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding"}

    async def test_is_what_a_redirect_leads_to(self, site: Site) -> None:
        assert await fetch(site.url(f"/redirect?to={site.url()}"), "image", 10**6) == picture()

    async def test_is_not_decompressed(self, site: Site) -> None:
        assert await fetch(site.url("/gzip"), "image", 10**6) == picture()

    async def test_is_bounded_in_size_as_it_arrives(self, site: Site) -> None:
        error = await refusal(site.url("/endless"), max_bytes=100_000)
        assert (error.status, error.code) == (413, "file_too_large")
        assert (await refusal(site.url(), max_bytes=len(picture()) - 1)).status == 413
        assert await fetch(site.url(), "image", len(picture())) == picture()

    async def test_is_bounded_in_time(self, site: Site, monkeypatch) -> None:
        monkeypatch.setattr(remote_media, "TIMEOUT_S", 0.2)
        started = time.monotonic()
        assert "within 0.2 s" in (await refusal(site.url("/slow"))).message
        assert time.monotonic() - started < 5

    async def test_is_bounded_in_redirects(self, site: Site) -> None:
        assert (await refusal(site.url("/redirect?to=/redirect"))).status == 400

    @pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/", "gopher://x", "//", "http://[::1"])
    async def test_is_only_http_also_after_a_redirect(self, site: Site, target: str) -> None:
        assert (await refusal(site.url(f"/redirect?to={target}"))).status == 400
        assert len(site.asked) == 1

    @pytest.mark.parametrize(
        "url", ["http://", "http:///x", "http://a:99999/", "http://[::1/", "http://\0", f"http://{'a' * 300}.example/"]
    )
    async def test_has_a_url_that_can_be_read(self, url: str) -> None:
        assert (await refusal(url)).status == 400

    async def test_tells_a_status_but_not_what_was_said(self, site: Site) -> None:
        assert "its URL responds with 404" in (await refusal(site.url("/nothing"))).message

    async def test_tells_nothing_of_ports_and_addresses(self, site: Site) -> None:
        closed = await refusal(site.url().replace(str(site.port), "1"))
        private = await refusal(site.url(host=PRIVATE))
        assert closed.message == private.message


@pytest.mark.usefixtures("one_is_public")
class TestAPrivateAddressIsNeverConnectedTo:
    @pytest.mark.parametrize("host", [PRIVATE, "127.2", "0x7f000002", "2130706434", "localhost.localdomain"])
    async def test_by_its_number_however_written(self, site: Site, host: str) -> None:
        await refusal(site.url(host=host))
        assert site.asked == []

    async def test_by_a_name(self, site: Site, resolve: Callable) -> None:
        resolve([PRIVATE])
        await refusal(site.url(host="pictures.example"))
        assert site.asked == []

    async def test_by_a_name_that_has_a_public_one_too(self, site: Site, resolve: Callable) -> None:
        resolve([PRIVATE, PUBLIC])
        assert await fetch(site.url(host="pictures.example"), "image", 10**6) == picture()
        assert site.asked == [f"{PUBLIC}/picture"]

    async def test_by_a_name_that_changes(self, site: Site, resolve: Callable) -> None:
        resolve([PUBLIC], [PRIVATE])
        url = site.url(host="pictures.example")
        assert await fetch(url, "image", 10**6) == picture()
        await refusal(url)
        assert site.asked == [f"{PUBLIC}/picture"]

    async def test_by_a_redirect(self, site: Site, resolve: Callable) -> None:
        await refusal(site.url(f"/redirect?to={site.url(host=PRIVATE)}"))
        resolve([PUBLIC], [PRIVATE])
        await refusal(site.url(f"/redirect?to={site.url(host='other.example')}", host="pictures.example"))
        assert set(site.asked) == {f"{PUBLIC}/redirect"}


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.usefixtures("one_is_public")
async def test_a_server_fetches_only_where_it_was_told_to_and_only_pictures(site: Site, allowed: bool) -> None:
    app = create_app(ServerArgs(allow_remote_media=allowed), StandInEngine(Task.IMAGE_TO_VIDEO), StandInState())
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as http:

        async def told(path: str) -> str:
            reference = {"image_url": site.url(path)}
            answer = await http.post("/v1/videos", json={"prompt": "p", "input_reference": reference, "seconds": 1e6})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == (
                "seconds" if allowed and path == "/picture" else "input_reference"
            )
            return answer.json()["error"]["message"]

        if allowed:
            assert "frames are asked for" in await told("/picture")  # which is checked after the image
            assert "Not a PNG, JPEG or WebP image" in await told("/text")
        else:
            assert "not fetched from remote URLs" in await told("/picture")
    assert len(site.asked) == (2 if allowed else 0)
