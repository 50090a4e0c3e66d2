"""The one place where a save becomes a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dcp_plugins.contract import Metadata, StorageWriter
from dcp_plugins.coord import Ranks
from dcp_plugins.events import record

__all__ = ["commit", "commit_alone"]


def commit(writer: StorageWriter, ranks: Ranks, metadata: Metadata | None, write: Callable[[], Any]) -> Metadata:
    """Let every rank write, and publish the metadata on the coordinator once none of them has failed.

    Args:
        metadata: The agreed metadata; only the coordinator has it.
        write: Writes this rank's part, durably, and returns storage's results.

    Returns:
        The metadata as published, on every rank.
    """

    def finish(results: list[Any]) -> Metadata:
        assert metadata is not None, "the coordinator commits what it has planned"
        return commit_alone(writer, metadata, *results)

    return ranks.all_reduce("write", write, finish)


def commit_alone(writer: StorageWriter, metadata: Metadata, *results: Any) -> Metadata:
    """Publish metadata and the results of all that was written; before this nothing is there, after it everything."""
    with record("commit"):
        writer.finish(metadata=metadata, results=list(results))
    return metadata
