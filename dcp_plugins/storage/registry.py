"""From a ``checkpoint_id`` to the storage that holds it; open for other storages."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from dcp_plugins.contract import StorageReader, StorageWriter
from dcp_plugins.errors import StorageDetectionError
from dcp_plugins.storage.reader import FileSystemReader
from dcp_plugins.storage.writer import FileSystemWriter

__all__ = ["find_reader", "find_writer", "register_storage"]

CheckpointId = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class _Storage:
    claims: Callable[[CheckpointId], bool]
    writer: Callable[[CheckpointId], StorageWriter]
    reader: Callable[[CheckpointId], StorageReader]


_storages: list[_Storage] = []


def register_storage(
    claims: Callable[[CheckpointId], bool],
    *,
    writer: Callable[[CheckpointId], StorageWriter],
    reader: Callable[[CheckpointId], StorageReader],
) -> None:
    """Make ``save`` and ``load`` choose a storage for the ids it claims; the last registered is asked first.

    Args:
        claims: Says whether an id is this storage's; called often, so it should look at the id only.
        writer: Makes a writer for an id, usually the writer's class.
        reader: Makes a reader for an id.
    """
    _storages.insert(0, _Storage(claims, writer, reader))


def find_writer(checkpoint_id: CheckpointId) -> StorageWriter:
    """Return a writer for the id.

    Raises:
        StorageDetectionError: No storage claims it.
    """
    for storage in _storages:
        if storage.claims(checkpoint_id):
            return storage.writer(checkpoint_id)
    if FileSystemWriter.validate_checkpoint_id(checkpoint_id):
        return FileSystemWriter(checkpoint_id)
    raise _unclaimed(checkpoint_id, "storage_writer")


def find_reader(checkpoint_id: CheckpointId) -> StorageReader:
    """Return a reader for the id.

    Raises:
        StorageDetectionError: No storage claims it.
    """
    for storage in _storages:
        if storage.claims(checkpoint_id):
            return storage.reader(checkpoint_id)
    if FileSystemReader.validate_checkpoint_id(checkpoint_id):
        return FileSystemReader(checkpoint_id)
    raise _unclaimed(checkpoint_id, "storage_reader")


def _unclaimed(checkpoint_id: CheckpointId, argument: str) -> StorageDetectionError:
    return StorageDetectionError(
        f"Cannot detect which storage to use for checkpoint_id {os.fspath(checkpoint_id)!r}: it is a URL, and "
        f"no registered storage claims it. Pass {argument}=, or use register_storage(...)"
    )
