"""Limits on what decoding a pickle may cost, in proportion to the length of the file.

- A key of a dict or a set is measured before it is hashed: tuples that share their elements, or that are nested very
  deeply, would keep the interpreter busy without end, or overflow its stack.
- Keys of one dict that all have the same hash are counted: each would be compared with all others.
- Each copy that a builder makes of data which the pickle can name again and again is counted against a budget.
"""

from __future__ import annotations

import collections
from typing import Any

from dcp_plugins.format.value_errors import DecodingError

__all__ = ["Limits"]

_BUDGET_BYTES_PER_BYTE = 32
_FREE_BUDGET_BYTES = 1 << 24
# How many elements keys that are tuples may have. An element takes at least one byte. If several keys share one,
# it is counted for each key.
_KEY_PARTS_PER_BYTE = 4
_FREE_KEY_PARTS = 1 << 20
_MAX_KEY_DEPTH = 100
# A dict with more keys of one hash than this is refused: finding a key would be slow.
_MAX_COLLISIONS = 64
# Smaller integers have different hashes, with few exceptions.
_DISTINCT_HASH = 1 << 61
_SIMPLE_KEYS = frozenset({str, bytes, float, bool, complex, type(None)})


class Limits:
    """The cost that decoding one pickle may still have.

    Args:
        size: Length in bytes of the file that holds it.
    """

    def __init__(self, size: int) -> None:
        self._bytes_left = _FREE_BUDGET_BYTES + _BUDGET_BYTES_PER_BYTE * size
        self._key_parts_left = _FREE_KEY_PARTS + _KEY_PARTS_PER_BYTE * size
        self._collisions: collections.Counter[tuple[int, int]] = collections.Counter()

    def charge(self, nbytes: int) -> None:
        """Count bytes that a builder is about to copy.

        Raises:
            DecodingError: The copies are out of all proportion to the file.
        """
        self._bytes_left -= nbytes
        if self._bytes_left < 0:
            raise DecodingError("a pickle that copies the same data again and again")

    def check_key(self, container: Any, key: Any) -> None:
        """Check that the file's length bounds the time to hash a key and to find it in a dict or set.

        Raises:
            DecodingError: It does not.
        """
        kind = key.__class__
        if kind in _SIMPLE_KEYS or (kind is int and -_DISTINCT_HASH < key < _DISTINCT_HASH):
            return
        if isinstance(key, (tuple, frozenset)):
            self._measure(key)
        place = (id(container), hash(key))
        self._collisions[place] += 1
        if self._collisions[place] > _MAX_COLLISIONS:
            raise DecodingError("keys that all have one hash")

    def _measure(self, key: tuple[Any, ...] | frozenset[Any]) -> None:
        pending: list[tuple[Any, int]] = [(key, 0)]
        while pending:
            part, depth = pending.pop()
            self._key_parts_left -= len(part) + 1
            if depth > _MAX_KEY_DEPTH or self._key_parts_left < 0:
                raise DecodingError("a key of tuples nested beyond measure")
            pending += [(item, depth + 1) for item in part if isinstance(item, (tuple, frozenset))]
