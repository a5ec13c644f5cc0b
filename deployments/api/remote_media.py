"""Pictures that lie elsewhere, fetched without letting a client reach what only this server can reach.

A URL names a host, a host resolves to addresses, an answer redirects to a further URL: what is decided about any of
them may no longer be true when the connection is made. So nothing is decided about them. The address is looked at
where a socket is made for it, and it is this socket that connects.
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
"""For one picture, from the look-up of its host to its last byte. 50 MB take 4 s at 100 Mbit/s."""

MAX_REDIRECTS = 3

_GLOBAL_UNICAST = IPv6Network("2000::/3")
"""All IPv6 addresses given out so far. Outside of it lie those that stand for IPv4 addresses (mapped, NAT64)."""


async def fetch(url: str, param: str, max_bytes: int) -> bytes:
    """What an http(s) URL from a client gives.

    Raises:
        APIError: 400 naming `param` for what cannot be fetched, or not from a public address; 413 for more than
            `max_bytes`.
    """
    connector = TCPConnector(socket_factory=_public_socket)
    # Nothing of this server's is sent along: no proxy's or .netrc's credentials, no cookies of an earlier answer.
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
    # ValueError: a URL or a redirect that cannot be read.
    except (aiohttp.ClientError, OSError, ValueError):
        raise _refused(param, "its URL cannot be fetched from a public address") from None


def is_public(address: str) -> bool:
    """Whether an IP address is one that anybody on the internet reaches: not private, link-local (where clouds keep
    credentials), loopback, reserved or multicast, nor one of these in the dress of another."""
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
