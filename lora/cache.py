"""A least-recently-used cache bounded in bytes, some of whose entries can be pinned. Standard library only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRUCache(Generic[K, V]):
    """Holds at most `max_bytes`, except that pinned entries always stay, and the newest one stays until the next `put`
    or `pin`, so that its owner can still pin it."""

    def __init__(self, max_bytes: int, size_of: Callable[[V], int]):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._size_of = size_of
        self._values: OrderedDict[K, V] = OrderedDict()
        """The least recently used first."""
        self._pinned: frozenset[K] = frozenset()

    def __contains__(self, key: K) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """The value, which becomes the most recently used; None when it is not held."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: K, value: V) -> None:
        """Hold `value` as the most recently used, then evict what no longer fits."""
        self.discard(key)
        self._values[key] = value
        self.num_bytes += self._size_of(value)
        self._evict(self._pinned | {key})

    def pin(self, keys: Collection[K]) -> None:
        """From now on, exempt exactly these keys from eviction, whether they are held yet or not."""
        self._pinned = frozenset(keys)
        self._evict(self._pinned)

    def discard(self, key: K) -> None:
        """Free one entry, pinned or not; nothing happens when it is not held."""
        if key in self._values:
            self.num_bytes -= self._size_of(self._values.pop(key))

    def _evict(self, spared: Collection[K]) -> None:
        for key in [key for key in self._values if key not in spared]:
            if self.num_bytes <= self.max_bytes:
                return
            self.discard(key)
