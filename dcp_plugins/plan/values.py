"""Non-tensor values: their conversion to bytes, and from bytes without running code.

A flattened optimizer has ten numbers for each parameter, nearly all of them equal, and torch takes a tenth to a
quarter of a millisecond to write or read one. So the bytes of small immutable values are cached, and the values of such
bytes.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Iterable
from typing import Any

import torch

from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.format.container import SMALL_CONTAINER_BYTES, record_checksums
from dcp_plugins.format.trust import SafeGlobal
from dcp_plugins.format.value_container import decode_value

__all__ = ["dump_value", "load_value"]

# The two caches live as long as the process.
_MAX_REMEMBERED_VALUES = 4096
_MAX_REMEMBERED_ITEMS = 256
_SCALARS = frozenset({type(None), bool, int, float, complex, str, bytes})

# Values by the bytes of their whole container.
_loaded: dict[bytes, Any] = {}


def dump_value(value: Any) -> io.BytesIO:
    """Return the value as ``torch.save`` writes it."""
    if _cannot_change(value):
        # The pickle is the key of the cache: True, 1 and 1.0 are equal, and so are 0.0 and -0.0.
        pickled = pickle.dumps(value, protocol=2)
        if len(pickled) <= SMALL_CONTAINER_BYTES:
            stream = io.BytesIO(_container_of(pickled))
            # Where the stream would stand after a write.
            stream.seek(0, io.SEEK_END)
            return stream
    return _save(value)


@functools.lru_cache(_MAX_REMEMBERED_VALUES)
def _container_of(pickled: bytes) -> bytes:
    return _save(pickle.loads(pickled)).getvalue()  # noqa: S301 - of a value of this process


def _save(value: Any) -> io.BytesIO:
    stream = io.BytesIO()
    # Users' tests replace `torch.save`. The bytes that such a replacement writes would stay in the cache.
    torch.serialization.save(value, stream)
    return stream


def _cannot_change(value: Any) -> bool:
    """Tell whether a value is immutable and worth caching: a number, a string, or a small tuple of such."""
    if type(value) in _SCALARS:
        return True
    if type(value) is not tuple:
        return False
    # Without a bound, a file with tuples that share their elements would keep this loop busy for ever.
    pending, num_seen = [value], 0
    while pending:
        items = pending.pop()
        num_seen += len(items)
        if num_seen > _MAX_REMEMBERED_ITEMS:
            return False
        for item in items:
            if type(item) is tuple:
                pending.append(item)
            elif type(item) not in _SCALARS:
                return False
    return True


def load_value(
    fqn: str,
    stream: io.BytesIO,
    *,
    weights_only: bool,
    safe_globals: Iterable[SafeGlobal] = (),
    map_location: str | torch.device | None = None,
    how_to_trust: str = "planner=DefaultLoadPlanner(weights_only=False)",
    verify_checksums: bool = False,
) -> Any:
    """Return the value that ``dump_value``, or torch, wrote.

    Args:
        fqn: The key of the value, for error messages.
        stream: The bytes, at the position where the value begins.
        weights_only: False runs whatever code the pickle names.
        safe_globals: Classes that are built as pickle would, beside those of ``torch.serialization.add_safe_globals``.
        map_location: The device on which tensors in the value arrive; None takes the one that each was saved from.
        how_to_trust: How a user of the caller says ``weights_only=False``, for error messages.
        verify_checksums: Compare the checksums of the container: for bytes that no storage's reader has checked.

    Raises:
        UnsafeCheckpointError: The value needs classes that are not admitted.
        CorruptCheckpointError: The bytes are no such value.
    """
    start = stream.tell()
    content = stream.read(SMALL_CONTAINER_BYTES + 1)
    # A trusted pickle may make a new or a mutable object each time: its values are not cached.
    is_small = weights_only and len(content) <= SMALL_CONTAINER_BYTES
    if is_small and content in _loaded:
        return _loaded[content]
    if not content.startswith((b"PK\x03\x04", b"\x80")):
        raise CorruptCheckpointError(
            f"{fqn}: the saved value cannot be read: expected what torch.save writes, found bytes that begin"
            f" {content[:4]!r}"
        )
    if verify_checksums and content.startswith(b"PK"):
        record_checksums(stream.getbuffer()[start:], fqn)
    if not weights_only:
        stream.seek(start)
        return _load_trusted(fqn, stream, map_location)
    loaded = decode_value(
        content if is_small else stream.getbuffer()[start:],
        fqn,
        safe_globals=safe_globals,
        map_location=map_location,
        advice=f"If you trust this checkpoint as you trust a program, load with {how_to_trust}",
    )
    if is_small and _cannot_change(loaded):
        if len(_loaded) >= _MAX_REMEMBERED_VALUES:
            _loaded.clear()
        _loaded[content] = loaded
    return loaded


def _load_trusted(fqn: str, stream: io.BytesIO, map_location: str | torch.device | None) -> Any:
    try:
        return torch.load(stream, map_location=map_location, weights_only=False)
    # Any other error comes from the code that the user chose to run.
    except (EOFError, RuntimeError, pickle.UnpicklingError) as exc:
        raise CorruptCheckpointError(f"{fqn}: the saved value cannot be read: {exc}") from exc
