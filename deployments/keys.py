"""API keys: who calls, whether it may, and whose records it sees.

Keys are hashed as soon as they are read. What leaves the process that read them, and what is stored beside a video, is
a SHA-256 digest: keys are random texts, which a digest does not give away.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from configs.server_args import ApiKey, ServerArgs
from deployments.errors import APIError


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request."""

    tenant: str | None
    """Digest of the key whose records it sees. None sees all: an admin, or anybody where /v1 asks for no key."""
    is_admin: bool
    """Whether it may change what others get. Everybody may where no admin key is set."""

    def require_admin(self, action: str) -> None:
        """Raises `APIError`: 403 for a valid key that is no admin's, 401 without a valid one."""
        if self.is_admin:
            return
        if self.tenant is None:
            raise _unauthenticated(f"{action} needs an admin API key")
        raise APIError(403, f"{action} needs an admin API key", code="admin_key_required")


@dataclass(frozen=True)
class Keyring:
    """Digests of the keys that the server takes."""

    ordinary: frozenset[str] = frozenset()
    admin: frozenset[str] = frozenset()

    @classmethod
    def read(cls, args: ServerArgs) -> Keyring:
        """Raises `OSError` or `ValueError` for a file that cannot be read, or that has no key or no proper one."""
        return cls(
            frozenset(map(_digest, [*args.api_key, *_keys_in(args.api_key_file)])),
            frozenset(map(_digest, [*args.admin_api_key, *_keys_in(args.admin_api_key_file)])),
        )

    def caller(self, key: str | None) -> Caller:
        """Who presents `key`. Raises `APIError` 401 where a key is needed and this is none."""
        digest = None if key is None else _digest(key)
        if _is_among(digest, self.admin):
            return Caller(tenant=None, is_admin=True)
        if not self.ordinary:
            return Caller(tenant=None, is_admin=not self.admin)
        if _is_among(digest, self.ordinary):
            return Caller(tenant=digest, is_admin=not self.admin)
        if key is None:
            raise _unauthenticated("You didn't provide an API key: send it as 'Authorization: Bearer KEY'")
        raise _unauthenticated("Incorrect API key provided")


OPEN = Keyring()
"""Lets everybody do everything."""


def _keys_in(path: str | None) -> list[str]:
    if path is None:
        return []
    lines = [line.strip() for line in Path(path).read_text().splitlines()]
    try:
        keys = TypeAdapter(list[ApiKey]).validate_python([line for line in lines if line])
    except ValidationError:
        raise ValueError(f"{path} has a line that is no API key: printable ASCII without spaces") from None
    if not keys:  # to go on would leave the server open
        raise ValueError(f"{path} has no API key")
    return keys


def _digest(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def _is_among(digest: str | None, known: Iterable[str]) -> bool:
    """Takes as long for every key: neither which one it is nor how much of one it is can be told from the time."""
    return digest is not None and sum(compare_digest(digest, one) for one in known) > 0


def _unauthenticated(message: str) -> APIError:
    return APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
