"""Saving in the background: stage on the calling thread, then plan, write and commit while training goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dcp_plugins.contract import AsyncStager, Metadata, SavePlanner, StorageWriter
from dcp_plugins.coord import Ranks
from dcp_plugins.engine.process_runner import check_sendable, process_runner
from dcp_plugins.engine.save import described, run_save
from dcp_plugins.engine.setup import open_writer, ranks_of
from dcp_plugins.engine.side_group import side_group
from dcp_plugins.engine.snapshot import Snapshot
from dcp_plugins.engine.thread_runner import PackedMetadata, is_ending, thread_runner
from dcp_plugins.errors import CheckpointException
from dcp_plugins.events import record
from dcp_plugins.pace import hurry
from dcp_plugins.plan import DefaultSavePlanner
from dcp_plugins.staging import BlockingAsyncStager, HandoverStager, shared_stager
from dcp_plugins.storage import FileSystemWriter

__all__ = ["AsyncCheckpointerType", "AsyncSaveResponse", "async_save", "begin_save"]

logger = logging.getLogger(__name__)


class AsyncCheckpointerType(Enum):
    """Where the background part of a save runs."""

    THREAD = "thread"
    PROCESS = "process"


@dataclass
class AsyncSaveResponse:
    """The result of ``async_save`` with a stager that works in the background."""

    staging_completion: Future[None]
    """Done when the snapshot is taken: parameters may change from then on."""
    upload_completion: Future[Metadata]
    """Done when the checkpoint exists."""


def async_save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Future[Metadata] | AsyncSaveResponse:
    """Take a snapshot of a state dict and save it in the background; see ``save`` for what it has in common with it.

    What the caller does to its tensors and other values after this has returned (with an asynchronous stager: after
    ``staging_completion``) is not in the checkpoint. One save is in flight at a time: a call first waits for the
    previous save. A save that fails raises at its future; where nobody asked the future, at the next call, and at the
    latest when the interpreter ends, which then prints the traceback and exits with status 1. The interpreter waits
    for a save in flight.

    Where there is no memory for the snapshot (the stager raises ``MemoryError``), this rank stages what fits, writes
    the rest from the state dict itself before all else, and says so in a warning; the call then returns, or
    ``staging_completion`` is done, when that rest is written (with a process, or a writer other than
    ``FileSystemWriter``: when all is).

    All ranks of the group call this, in the same order. The group needs no CPU backend: the ranks agree over a group
    that is made for it at the first call, so that nothing interleaves with the training's collectives.

    Args:
        state_dict: As for ``save``; the ``state_dict()`` of ``Stateful`` objects is called on the calling thread.
        checkpoint_id: Where to save.
        storage_writer: Writes to the storage; not to be used otherwise before the save has ended. One that is a
            stager itself stages, unless ``async_stager`` is given.
        planner: Plans the save, in the background.
        process_group: The ranks that save; None takes the default group.
        async_checkpointer_type: Where the background part runs.
        async_stager: Takes the snapshot; to be closed by the caller, after the last save. None takes one that this
            process keeps, with its memory, until ``dcp_plugins.staging.release_staging_memory()``.
        no_dist: Save from this process alone.
        use_collectives: False saves without agreement among the ranks, as in ``save``.

    Returns:
        The future of the checkpoint's metadata; with a stager whose ``stage`` gives a future, both futures.

    Raises:
        CheckpointException: The previous save failed, and nobody has asked its future.
        UnsupportedValueError: A value cannot be copied. The other ranks learn of it from their futures.
        RuntimeError: The main thread has ended, so that nothing would wait for the save; the process then exits with
            status 1.
    """
    return begin_save(
        state_dict,
        checkpoint_id=checkpoint_id,
        storage_writer=storage_writer,
        planner=planner,
        process_group=process_group,
        # By value: torch's own enum will do as well.
        kind=AsyncCheckpointerType(getattr(async_checkpointer_type, "value", async_checkpointer_type)),
        async_stager=async_stager,
        no_dist=no_dist,
        use_collectives=use_collectives,
    )


def begin_save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    kind: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    is_queued: bool = False,
    has_owner: bool = False,
) -> Future[Metadata] | AsyncSaveResponse:
    """Do what ``async_save`` does, with two more options that torch's signature does not have.

    Args:
        has_owner: The caller waits for this save and reports its failure. This call raises no failure of an earlier
            save, and no later call raises the failure of this one: two owners in one process are not told of each
            other's failures. The same on every rank.
        is_queued: Do not wait for the save in flight: stage now, and write once that save has ended, whatever becomes
            of it. Its failure is not raised here. The same on every rank. The stager's memory must not be that of a
            save in flight.
    """
    in_process = kind is AsyncCheckpointerType.PROCESS
    with thread_runner.turn, record("async_save", checkpoint_id=checkpoint_id):
        ranks = ranks_of(process_group, no_dist=no_dist, verb="save")
        in_group = not no_dist and dist.is_available() and dist.is_initialized()
        if ranks.distributed:
            ranks = Ranks(side_group(process_group), distributed=True)
        try:
            thread_runner.check_can_start()
            working_directory = str(Path.cwd()) if in_process else ""
            previous_failure = None
            if has_owner and not is_queued:
                thread_runner.wait()
            elif not is_queued:
                previous_failure = thread_runner.finish_previous()
            if previous_failure is not None:
                logger.error("an asynchronous save failed, and nobody asked for its result: raised at the next one")
                raise previous_failure
            # A writer of the caller's is reset later: it may be its own stager, and still be staging.
            writer = open_writer(None, checkpoint_id) if storage_writer is None else storage_writer
            if in_process:
                check_sendable(writer, planner or DefaultSavePlanner())
                if not thread_runner.is_busy:
                    process_runner.start()
            stager = _stager_for(writer, in_process) if async_stager is None else async_stager
            with record("stage"):
                snapshot = Snapshot(stager, described(state_dict), in_part=not in_process)
        except BaseException as exc:
            # The other ranks are about to agree on this save: they must hear that this one is out of it.
            _join_as_failed(ranks, exc)
            raise

        def ready() -> dict[str, Any]:
            staged = snapshot.take()
            if snapshot.is_original is not None:
                # Training waits until that is written.
                hurry()
            if isinstance(stager, HandoverStager):
                staged = stager.hand_over(staged)
            if storage_writer is not None:
                open_writer(storage_writer, checkpoint_id)
                if in_process and checkpoint_id is None and isinstance(storage_writer, FileSystemWriter):
                    # In this process it never learns that it has written: a second save must not take the same names.
                    storage_writer.reset()
            return staged

        def save_staged() -> Metadata | PackedMetadata:
            with record("save", checkpoint_id=checkpoint_id):
                if in_process:
                    return process_runner.save(
                        ranks,
                        lambda: (ready(), writer),
                        planner or DefaultSavePlanner(),
                        in_group=in_group,
                        use_collectives=use_collectives,
                        working_directory=working_directory,
                    )
                staged = ranks.settle("stage", ready)
                if snapshot.is_original is not None and isinstance(writer, FileSystemWriter):
                    writer.write_first(snapshot.is_original, snapshot.release)
                return run_save(
                    staged,
                    lambda: writer,
                    planner or DefaultSavePlanner(),
                    ranks,
                    use_collectives=use_collectives,
                    is_staged=True,
                )

        upload = thread_runner.start(save_staged, then=snapshot.written, has_owner=has_owner)
        if snapshot.completion is not None:
            # Where the staging finds no memory, training waits for this save, and for those before it.
            snapshot.if_held(upload.hurry)
            return AsyncSaveResponse(snapshot.completion, upload)
        if snapshot.is_original is not None:
            upload.hurry()
        snapshot.wait()
        _synchronize(stager)
        return upload


# The memory lives as long as the writer, as if the writer were the stager, which torch's is.
_writers_stagers: weakref.WeakKeyDictionary[StorageWriter, BlockingAsyncStager] = weakref.WeakKeyDictionary()


def _stager_for(writer: StorageWriter, in_process: bool) -> AsyncStager:
    """Return the stager of a save that was given none."""
    if isinstance(writer, AsyncStager):
        return writer
    if in_process:
        # The shared stager keeps its memory for the next save too. The writer's own memory is not shared memory.
        return shared_stager(for_process=True)
    if isinstance(writer, FileSystemWriter) and writer.cache_staged_state_dict:
        stager = _writers_stagers.get(writer)
        if stager is None:
            stager = _writers_stagers[writer] = BlockingAsyncStager(cache_staged_state_dict=True)
        return stager
    return shared_stager()


def _join_as_failed(ranks: Ranks, failure: BaseException) -> None:
    """Take part in the first exchange of a save that this rank cannot make, in the background."""
    if not ranks.distributed:
        return

    def fail() -> Metadata:
        raise failure

    # This rank raises the failure itself, now.
    if is_ending():
        # The interpreter starts no more threads.
        with contextlib.suppress(CheckpointException):
            ranks.settle("stage", fail)
    else:
        thread_runner.start(lambda: ranks.settle("stage", fail)).disown()


def _synchronize(stager: AsyncStager) -> None:
    """Wait for a stager that returned before it was done; one that inherits the protocol's method has nothing to do."""
    overridden = getattr(type(stager), "synchronize_staging", None) is not AsyncStager.synchronize_staging
    if overridden and stager.should_synchronize_after_execute:
        stager.synchronize_staging()
