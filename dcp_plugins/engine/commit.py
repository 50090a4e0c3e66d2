"""The one place where a save becomes a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

from dcp_plugins.contract import Metadata, StorageWriter
from dcp_plugins.coord import Ranks, Sealed
from dcp_plugins.errors import UnsupportedValueError
from dcp_plugins.events import record
from dcp_plugins.storage.writer import FileSystemWriter
from dcp_plugins.user_warnings import warn_user

__all__ = ["commit", "commit_alone"]


def commit(writer: StorageWriter, ranks: Ranks, metadata: Metadata | None, write: Callable[[], Any]) -> Metadata:
    """Let every rank write, and publish the metadata on the coordinator once none of them has failed.

    Args:
        metadata: The agreed metadata; only the coordinator has it.
        write: Writes this rank's part, durably, and returns storage's results.

    Returns:
        The metadata as published, on every rank.
    """

    def finish(results: list[Any]) -> Sealed[Metadata]:
        assert metadata is not None, "the coordinator commits what it has planned"
        if not isinstance(writer, FileSystemWriter):
            return Sealed(commit_alone(writer, metadata, *results), "write")
        writer.confirm_commit = ranks.check_is_awaited
        try:
            return Sealed(commit_alone(writer, metadata, *results), "write")
        finally:
            writer.confirm_commit = None

    def unavailable(reason: str) -> Sealed[Metadata]:
        # The checkpoint exists, and no exchange follows to tell the other ranks: this rank must not raise alone.
        warn_user(f"the save is complete, but its metadata cannot be returned on rank {ranks.rank}: {reason}")
        return Sealed(_UnavailableMetadata(reason), "write")

    # A rank that failed has deleted its files. Those of the others would take the room of the next save.
    undo = writer.abandon if isinstance(writer, FileSystemWriter) else None
    reply = ranks.all_reduce("write", write, finish, undo=undo, if_unheard=unavailable)
    try:
        return reply.open()
    except UnsupportedValueError as exc:
        return unavailable(str(exc)).open()


def commit_alone(writer: StorageWriter, metadata: Metadata, *results: Any) -> Metadata:
    """Publish metadata and the results of all that was written; before this nothing is there, after it everything."""
    with record("commit"):
        try:
            writer.finish(metadata=metadata, results=list(results))
        except BaseException:
            if isinstance(writer, FileSystemWriter):
                writer.abandon(results)
            raise
    return metadata


class _UnavailableMetadata(Metadata):
    """Stands for metadata that this rank could not unpickle: reading a field raises the reason."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __repr__(self) -> str:
        return f"<metadata that is not available: {self._reason}>"


def _refusing(name: str) -> property:
    def refuse(self: _UnavailableMetadata) -> NoReturn:
        raise UnsupportedValueError(f"{name} of the metadata is not available on this rank: {self._reason}")

    return property(refuse)


for _field in dataclasses.fields(Metadata):
    setattr(_UnavailableMetadata, _field.name, _refusing(_field.name))
