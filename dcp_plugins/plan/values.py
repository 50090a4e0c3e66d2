"""Non-tensor values: how they become bytes, and how bytes become values without running code.

A flattened optimizer has ten numbers for each parameter, nearly all of them equal, and torch takes a tenth to a
quarter of a millisecond to write or read one. So what a small value that cannot change became is remembered, in both
directions.
"""

from __future__ import annotations

import datetime
import functools
import io
import pickle
import re
from pathlib import PosixPath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from dcp_plugins.errors import CorruptCheckpointError, UnsafeCheckpointError
from dcp_plugins.format.container import SMALL_CONTAINER_BYTES

__all__ = ["dump_value", "load_value"]


@functools.cache
def _plain_types() -> list[Any]:
    """Return classes that hold data only, beyond those torch's restricted unpickler knows.

    Training states are full of them: NumPy's random state is a tuple with an array, and a ``BytesIO`` is what somebody
    serialised himself. Building one runs no code that the pickle could choose.
    """
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDGSUVMm"}
    array_makers = [np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]]
    paths = [PosixPath, PurePosixPath, PureWindowsPath]
    times = [datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone]
    return [io.BytesIO, np.ndarray, np.dtype, *dtypes, *array_makers, *paths, *times]


# Kept for the life of the process.
_MAX_REMEMBERED_VALUES = 4096
_SCALARS = frozenset({type(None), bool, int, float, complex, str, bytes})

# What a container that holds nothing else was found to hold.
_loaded: dict[bytes, Any] = {}


def dump_value(value: Any) -> io.BytesIO:
    """Return the value as ``torch.save`` writes it."""
    if _cannot_change(value):
        # Equal values may differ (True, 1 and 1.0; 0.0 and -0.0), their pickles do not.
        pickled = pickle.dumps(value, protocol=2)
        if len(pickled) <= SMALL_CONTAINER_BYTES:
            stream = io.BytesIO(_container_of(pickled))
            # As after writing.
            stream.seek(0, io.SEEK_END)
            return stream
    return _save(value)


@functools.lru_cache(_MAX_REMEMBERED_VALUES)
def _container_of(pickled: bytes) -> bytes:
    return _save(pickle.loads(pickled)).getvalue()  # noqa: S301 - of a value of this process


def _save(value: Any) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream


def _cannot_change(value: Any) -> bool:
    return type(value) in _SCALARS or (type(value) is tuple and all(map(_cannot_change, value)))


def load_value(fqn: str, stream: io.BytesIO, *, weights_only: bool) -> Any:
    """Return the value that ``dump_value``, or torch, wrote.

    Args:
        fqn: Its key, for error messages.
        stream: At its beginning.
        weights_only: False runs whatever code the pickle names.

    Raises:
        UnsafeCheckpointError: The value needs classes that are not admitted.
        CorruptCheckpointError: The bytes are no such value.
    """
    start = stream.tell()
    content = stream.read(SMALL_CONTAINER_BYTES + 1)
    stream.seek(start)
    # With more than plain data allowed, it is for the pickle to say what it makes each time.
    is_small = weights_only and len(content) <= SMALL_CONTAINER_BYTES
    if is_small and content in _loaded:
        return _loaded[content]
    loaded = _load(fqn, stream, content[:4], weights_only=weights_only)
    if is_small and _cannot_change(loaded):
        if len(_loaded) >= _MAX_REMEMBERED_VALUES:
            _loaded.clear()
        _loaded[content] = loaded
    return loaded


def _load(fqn: str, stream: io.BytesIO, head: bytes, *, weights_only: bool) -> Any:
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        # The unpickler would take the damage for a class that it does not admit.
        raise CorruptCheckpointError(
            f"{fqn}: the saved value cannot be read: expected what torch.save writes, found bytes that begin {head!r}"
        )
    try:
        if not weights_only:
            return torch.load(stream, weights_only=False)
        with torch.serialization.safe_globals(_plain_types()):
            return torch.load(stream, weights_only=True)
    except pickle.UnpicklingError as exc:
        reason = re.search(r"WeightsUnpickler error:\s*([^\n]+?)(?: Please use|\n|$)", str(exc))
        raise UnsafeCheckpointError(
            f"{fqn}: the saved value needs classes that are not admitted: {reason.group(1) if reason else exc} "
            "If the class is yours, admit it with torch.serialization.add_safe_globals([...]). If you trust this "
            "checkpoint as you trust a program, load with planner=DefaultLoadPlanner(weights_only=False)"
        ) from exc
    # Damaged bytes make torch's unpickler fail in any way its opcodes can.
    except Exception as exc:
        if not weights_only and not isinstance(exc, (EOFError, RuntimeError)):
            # Raised by the code that the user chose to run.
            raise
        raise CorruptCheckpointError(f"{fqn}: the saved value cannot be read: {exc}") from exc
