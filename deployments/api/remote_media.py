"""Fetches remote images without letting a client reach what only this server can reach.

A URL names a host, a host resolves to addresses, and a response may redirect to another URL: a check of any of these
may no longer hold when the connection is made. So none is checked in advance. The address is checked where a socket is
created for it, and that same socket connects.
"""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Network, ip_address

import aiohttp
from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, TCPConnector

from deployments.api.multipart import too_large
from deployments.errors import APIError

HEADERS = {"User-Agent": "ditserve", "Accept": "image/png, image/webp, image/jpeg", "Accept-Encoding": "identity"}

TIMEOUT_S = 20.0
"""For one image, from the DNS lookup to the last byte. 50 MB take 4 s at 100 Mbit/s."""

MAX_REDIRECTS = 3

_GLOBAL_UNICAST = IPv6Network("2000::/3")
"""All IPv6 addresses allocated so far. Those that stand for IPv4 addresses (mapped, NAT64) are outside it."""


async def fetch(url: str, param: str, max_bytes: int) -> bytes:
    """The bytes at an http(s) URL from a client.

    Raises:
        APIError: 400 naming `param` if they cannot be fetched from a public address; 413 for more than `max_bytes`.
    """
    connector = TCPConnector(socket_factory=_public_socket)
    # Nothing of this server's own is sent: no credentials of a proxy or .netrc, no cookies of an earlier response.
    session = ClientSession(
        connector=connector,
        cookie_jar=DummyCookieJar(),
        trust_env=False,
        timeout=ClientTimeout(total=TIMEOUT_S),
        auto_decompress=False,
        headers=HEADERS,
    )
    try:
        async with session, session.get(url, max_redirects=MAX_REDIRECTS) as response:
            if response.status != 200:
                raise _refused(param, f"its URL responds with {response.status}")
            data = bytearray()
            async for chunk in response.content.iter_any():
                data += chunk
                if len(data) > max_bytes:
                    raise too_large(param, max_bytes)
            return bytes(data)
    except TimeoutError:
        raise _refused(param, f"its URL did not give it within {TIMEOUT_S:g} s") from None
    # ValueError: a URL or a redirect that cannot be parsed.
    except (aiohttp.ClientError, OSError, ValueError):
        raise _refused(param, "its URL cannot be fetched from a public address") from None


def is_public(address: str) -> bool:
    """Whether anybody on the internet can reach this IP address: it is not private, link-local (where clouds keep
    credentials), loopback, reserved or multicast, nor an IPv6 form that may embed such an address."""
    ip = ip_address(address.partition("%")[0])
    if not ip.is_global or ip.is_multicast:
        return False
    if isinstance(ip, IPv4Address):
        return True
    return ip in _GLOBAL_UNICAST and ip.sixtofour is None and ip.teredo is None


def _public_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol, _, (host, *_) = address
    if not is_public(host):
        raise PermissionError(f"{host} is not a public address")
    return socket.socket(family, kind, protocol)


def _refused(param: str, reason: str) -> APIError:
    return APIError(400, f"Invalid '{param}': {reason}", param=param, code="invalid_image")
