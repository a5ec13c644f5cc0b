"""How far a result computed by several ranks is from the one that one rank computes alone."""

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
    """Of the result: equal results have equal digests."""


def compare(result: Tensor, expected: Tensor | None) -> Comparison:
    """Ranks whose result is only held against rank 0's, by its digest, need not compute what is `expected`."""
    expected = result if expected is None else expected
    # numpy has no bfloat16, and float64 holds it exactly.
    result, expected = result.double(), expected.double()
    return Comparison(
        error=float((result - expected).norm() / expected.norm()),
        exact=bool((result == expected).all()),
        digest=sha256(result.contiguous().numpy().tobytes()).hexdigest(),
    )
