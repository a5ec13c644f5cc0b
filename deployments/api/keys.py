"""API keys: who is calling, what it may do, and whose records it sees.

Keys are hashed as soon as they are read. Only SHA-256 digests leave the process that read them, or are stored with a
video: keys are random texts, which a digest does not reveal.
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
    """The sender of a request."""

    tenant: str | None
    """Digest of the key whose records it sees. None sees all: an admin, or anybody if /v1 requires no key."""
    is_admin: bool
    """Whether it may change what others get. Everybody may if no admin key is set."""

    def require_admin(self, action: str) -> None:
        """Raises `APIError`: 403 for a valid key that is not an admin's, 401 without a valid one."""
        if self.is_admin:
            return
        if self.tenant is None:
            raise _unauthenticated(f"{action} needs an admin API key")
        raise APIError(403, f"{action} needs an admin API key", code="admin_key_required")


@dataclass(frozen=True)
class Keyring:
    """Digests of the keys that the server accepts."""

    ordinary: frozenset[str] = frozenset()
    admin: frozenset[str] = frozenset()

    @classmethod
    def read(cls, args: ServerArgs) -> Keyring:
        """Raises `OSError` or `ValueError` for a file that cannot be read, or that has no key or a malformed one."""
        return cls(
            frozenset(map(_digest, [*args.api_key, *_keys_in(args.api_key_file)])),
            frozenset(map(_digest, [*args.admin_api_key, *_keys_in(args.admin_api_key_file)])),
        )

    def caller(self, key: str | None) -> Caller:
        """The caller that sent `key`. Raises `APIError` 401 if a key is required and this is not a valid one."""
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
    if not keys:  # continuing would leave the server open
        raise ValueError(f"{path} has no API key")
    return keys


def _digest(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def _is_among(digest: str | None, known: Iterable[str]) -> bool:
    """Takes the same time for every key, so the time reveals neither which key matched nor how much of one."""
    return digest is not None and sum(compare_digest(digest, one) for one in known) > 0


def _unauthenticated(message: str) -> APIError:
    return APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
