"""Ray's errors in simpler terms: a process that is gone, or what the remote call raised."""

from __future__ import annotations

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError

PROCESS_LOST = (RayActorError, NodeDiedError, OutOfMemoryError)
"""Raised by a call whose process is gone: it died, its machine died, or Ray killed it because the machine was out of
memory, which is a separate error and no `RayActorError`."""


def cause(error: BaseException) -> BaseException:
    """What the remote call raised: Ray wraps it in an error whose text is a traceback."""
    return error.cause if isinstance(error, RayTaskError) else error
