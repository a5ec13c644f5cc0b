"""Ray's errors in our words: a process that is gone, or what was raised at the other end."""

from __future__ import annotations

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError

PROCESS_LOST = (RayActorError, NodeDiedError, OutOfMemoryError)
"""What a call ends with whose process is gone: it died, its machine did, or Ray killed it because the machine was out
of memory, which is a kind of its own and no `RayActorError`."""


def cause(error: BaseException) -> BaseException:
    """What was raised at the other end: Ray wraps it in an error whose text is a traceback."""
    return error.cause if isinstance(error, RayTaskError) else error
