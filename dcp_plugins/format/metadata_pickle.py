"""The pickle of a ``Metadata``, and of the ones that differ from it only in where the bytes are.

The stream is ``PROTO 4, FRAME, MARK, pool, POP_MARK, Metadata, STOP``: POP_MARK drops the pool from the stack, and what
follows refers to it with BINGET. Objects that are not of the vocabulary come first in the pool, pickled by ``pickle``
itself.
"""

from __future__ import annotations

import operator
import pickle
import struct
from typing import Any

from dcp_plugins.contract import Metadata, StorageMeta
from dcp_plugins.errors import UnsupportedValueError
from dcp_plugins.format.metadata_writer import Emitter
from dcp_plugins.format.pickle_opcodes import pickle_foreign
from dcp_plugins.format.saved_mappings import fields_of

__all__ = ["PickleWriter"]


class PickleWriter:
    """Pickles metadata; that of saves with one plan in little more than the time it takes to join the bytes.

    Tensors, paths and keys that are those of the call before are not emitted again. Entries of tensors are compared by
    identity, so they must not be changed in place between two calls.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def write(self, metadata: Metadata) -> bytes:
        """Return a pickle that ``pickle.loads`` reads to an object equal to ``metadata``.

        Raises:
            UnsupportedValueError: Something in it cannot be pickled.
        """
        kept, self._kept = self._kept, None
        try:
            if type(metadata) is not Metadata or type(metadata.state_dict_metadata) is not dict:
                return pickle.dumps(metadata, protocol=4)
            if kept is None or not kept.is_of(metadata):
                kept = _Kept(metadata, Emitter(b"", 0, {}))
            emitter, body = kept.emit(metadata)
            if emitter.foreign:
                # Their opcodes number the memo from zero, so they lead the stream: start over with them known.
                emitter, body = _Kept(metadata, Emitter(*pickle_foreign(list(emitter.foreign.values())))).emit(metadata)
            else:
                self._kept = kept
        except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as exc:
            raise UnsupportedValueError(
                f"the checkpoint's metadata cannot be pickled: {exc}. Objects that a planner or a storage puts into it "
                "must be of importable classes"
            ) from exc
        parts = (b"(", emitter.head, *emitter.pool, b"1", body, b".")
        return b"".join((b"\x80\x04\x95", struct.pack("<Q", sum(map(len, parts))), *parts))


class _Kept:
    """What has been emitted of tensors and paths, and of keys of the storage."""

    def __init__(self, metadata: Metadata, emitter: Emitter) -> None:
        self._emitter = emitter
        self._fqns = list(metadata.state_dict_metadata)
        self._entries = list(metadata.state_dict_metadata.values())
        self._paths = dict(metadata.planner_data) if type(metadata.planner_data) is dict else None
        self._emitted = {"state_dict_metadata": emitter.tensors(metadata.state_dict_metadata)}
        if self._paths is not None:
            self._emitted["planner_data"] = emitter.paths(self._paths)
        emitter.join_pool()
        self._indices: list[Any] = []
        # By the keys' ids; the keys are kept as long.
        self._emitted_indices: dict[int, bytes] = {}

    def is_of(self, metadata: Metadata) -> bool:
        """Whether all that is kept is right for ``metadata`` too."""
        tensors = metadata.state_dict_metadata
        return (
            self._paths is not None
            and type(metadata.planner_data) is dict
            and len(tensors) == len(self._fqns)
            and all(map(operator.is_, tensors.values(), self._entries))
            and list(tensors) == self._fqns
            and metadata.planner_data == self._paths
        )

    def emit(self, metadata: Metadata) -> tuple[Emitter, bytes]:
        """Return opcodes that push ``metadata``, and the emitter whose pool they refer to."""
        storage = metadata.storage_data
        indices = self._emit_indices(list(storage)) if type(storage) is dict else []
        emitter = self._emitter.fork()
        fields = []
        for name, value in fields_of(metadata).items():
            emitted = self._emitted.get(name)
            if emitted is None:
                if name == "storage_data" and type(value) is dict:
                    emitted = emitter.storage(indices, value.values())
                elif name == "storage_meta" and type(value) is StorageMeta:
                    emitted = emitter.storage_meta(value)
                else:
                    emitted = emitter.value(value)
            fields.append((name, emitted))
        return emitter, emitter.instance(Metadata, fields)

    def _emit_indices(self, indices: list[Any]) -> list[bytes]:
        known = list(map(self._emitted_indices.get, map(id, indices)))
        if None not in known:
            return known  # type: ignore[return-value]
        emitted = self._emitter.indices(indices)
        self._indices = indices
        self._emitted_indices = dict(zip(map(id, indices), emitted, strict=True))
        return emitted
