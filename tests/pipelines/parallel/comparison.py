"""How far a result computed by several ranks is from the one that a rank computes alone."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    error: float
    """Relative L2."""
    exact: bool
    """Whether every bit is the same."""
    digest: str
    """Of the result: ranks that hold the same have the same."""


def compare(result: Tensor, expected: Tensor) -> Comparison:
    return Comparison(
        error=float((result - expected).double().norm() / expected.double().norm()),
        exact=bool((result == expected).all()),
        digest=sha256(result.contiguous().numpy().tobytes()).hexdigest(),
    )
