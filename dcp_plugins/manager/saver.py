"""`Saver`: one save after another, in the foreground or the background, and what must follow each of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dcp_plugins.contract import Metadata, SavePlanner
from dcp_plugins.engine import AsyncCheckpointerType, AsyncSaveResponse, await_staging_before_step, save
from dcp_plugins.engine.async_save import begin_save
from dcp_plugins.engine.thread_runner import thread_runner
from dcp_plugins.errors import CheckpointException, PlanError
from dcp_plugins.manager.agreement import deciding_ranks, is_alone
from dcp_plugins.manager.failed_saves import forget_failure, note_failure
from dcp_plugins.manager.in_flight import InFlight, wait_for_all
from dcp_plugins.manager.options import SaveOptions
from dcp_plugins.plan.diverging import DivergingSavePlanner
from dcp_plugins.plan.flatten import KeyPath
from dcp_plugins.staging import BlockingAsyncStager, HandoverStager, OverlappedStager
from dcp_plugins.storage import FileSystemWriter

__all__ = ["Saver", "expected_warnings", "renormed_weights", "unwrapped_plan_errors"]

_Stager = BlockingAsyncStager | HandoverStager | OverlappedStager


@dataclass(slots=True)
class _Staging:
    """A stager, and the last save that was begun from its memory."""

    stager: _Stager
    save: Future[Metadata] | None = None

    @property
    def is_free(self) -> bool:
        return self.save is None or self.save.done()


class Saver:
    """Saves into one directory after another, one at a time, and does after each commit what must follow.

    All ranks of the group call its methods together and in the same order, on the thread that trains, with one
    exception: `after_commit` concerns the calling rank alone. It may be used again after `close`.

    Args:
        options: How to save.
        no_dist: Save from this process alone, whatever process group may exist.
        process_group: The ranks that save; None takes the default group, if there is one when a save is made.
        watch_first: As for `OverlappedStager`. Used for frameworks whose hooks may change parameters between two steps.
    """

    def __init__(
        self,
        options: SaveOptions = SaveOptions(),  # noqa: B008 - frozen
        *,
        no_dist: bool = False,
        process_group: dist.ProcessGroup | None = None,
        watch_first: bool = False,
    ) -> None:
        self._watch_first = watch_first
        self.options = options
        self.no_dist = no_dist
        """May be changed between saves."""
        self.process_group = process_group
        self.newest: Path | None = None
        """The last directory that a save was begun into, committed or not."""
        self._in_flight = InFlight()
        self._stagings: list[_Staging] = []
        self._staged_kind: AsyncCheckpointerType | None = None
        self._staged_tensors: tuple[Sequence[Any], Sequence[Any]] = ((), ())

    @property
    def is_busy(self) -> bool:
        """Whether a save is in flight on this rank; others may differ."""
        return self._in_flight.is_busy

    def save(
        self,
        state_dict: dict[str, Any],
        path: str | os.PathLike[str],
        *,
        optimizers: Iterable[Optimizer] = (),
        changed_by_forward: Iterable[torch.Tensor] = (),
        diverging: Collection[KeyPath] = (),
        writer: FileSystemWriter | None = None,
        blocking: bool | None = None,
        queue: bool = False,
    ) -> None:
        """Save to the directory ``path``, whose previous checkpoint stays loadable until the new one is committed.

        In the foreground the checkpoint is committed on return, or every rank raises. In the background this returns
        while the writing goes on: values may be changed from then on, except for the parameters and the state of
        ``optimizers``, whose next step waits until they are copied. A save that fails in the background is raised by
        the next call that finishes it. If a rank cannot even begin, every rank raises, now.

        Args:
            state_dict: As for ``dcp_plugins.save``.
            path: The same on every rank.
            optimizers: Those whose parameters and state are in the state dict. Others than in the last save cost a new
                allocation of staging memory.
            changed_by_forward: Parameters of theirs that the forward pass changes.
            diverging: The paths of values that ranks may hold with different contents, as in `DivergingSavePlanner`.
            writer: Writes to ``path``; None makes one by the options.
            blocking: True saves in the foreground, False in the background, whatever the options say (in a thread, if
                they say "off").
            queue: In the background, let the save in flight go on: this one is staged now, into memory of its own that
                is kept, and written after it. One save waits at most: if one does, this first waits for the save in
                flight, whose failure it raises. A failure of the save that goes on is raised by a later call.

        Raises:
            CheckpointException: This save, or the one before it, failed; raised on every rank.
        """
        path = Path(path)
        if writer is not None and writer.path != path:
            raise ValueError(f"path and the writer's path must be the same, got {path} and {writer.path}")
        in_background = self.options.asynchronous != "off" if blocking is None else not blocking
        self.finish(but_last=queue and in_background)
        if writer is None:
            writer = _Writer(path, sync_files=self.options.sync_files, thread_count=self.options.thread_count)
        planner = DivergingSavePlanner(diverging)
        forget_failure(path)
        try:
            if in_background:
                self._begin(state_dict, path, writer, planner, list(optimizers), list(changed_by_forward))
            else:
                self._save(state_dict, writer, planner)
                self.newest = path
        except Exception as exc:
            note_failure(path, exc)
            raise

    def after_commit(self, step: Callable[[], None]) -> None:
        """Do something once the save begun last is committed, and not at all if it fails; now if none is in flight.

        What is put off runs on a thread, in the order of the calls; what fails there is logged.
        """
        self._in_flight.after_commit(step)

    def wait(self) -> None:
        """Wait for what is in flight and what follows it, whatever comes of it; a failure stays to be raised.

        Saves of other objects in this process are waited for, too: the next load may be of what they are saving.
        """
        wait_for_all()
        self._in_flight.wait()

    def finish(self, *, but_last: bool = False) -> None:
        """Wait until what is in flight is committed and what follows it is done; raise its failure, once.

        Args:
            but_last: Let the save that was begun last go on.
        """
        if but_last:
            self._in_flight.finish_but_last()
        else:
            self._in_flight.finish()

    def close(self) -> None:
        """Finish the save in flight, and free the memory that it was staged in."""
        try:
            self.finish()
        finally:
            self._free_stagers()

    def _save(self, state_dict: dict[str, Any], writer: FileSystemWriter, planner: SavePlanner) -> None:
        with expected_warnings():
            save(
                state_dict,
                storage_writer=writer,
                planner=planner,
                process_group=self.process_group,
                no_dist=is_alone(no_dist=self.no_dist),
            )

    def _begin(
        self,
        state_dict: dict[str, Any],
        path: Path,
        writer: FileSystemWriter,
        planner: SavePlanner,
        optimizers: list[Optimizer],
        changed_by_forward: list[torch.Tensor],
    ) -> None:
        """Save in the background; if a rank cannot begin, every rank raises."""
        alone = is_alone(no_dist=self.no_dist)
        ranks = deciding_ranks(self.process_group, no_dist=alone)
        in_process = self.options.asynchronous == "process"
        kind = AsyncCheckpointerType.PROCESS if in_process else AsyncCheckpointerType.THREAD
        staging = self._staging_for(kind, optimizers, changed_by_forward)
        failure: BaseException | None = None
        try:
            with expected_warnings():
                begun = begin_save(
                    state_dict,
                    storage_writer=writer,
                    planner=planner,
                    process_group=self.process_group,
                    no_dist=alone,
                    kind=kind,
                    async_stager=staging.stager,
                    is_queued=self._in_flight.is_any,
                    has_owner=True,
                )
            if isinstance(begun, AsyncSaveResponse):
                stager = staging.stager
                before_step = stager.note_changes if isinstance(stager, OverlappedStager) else None
                await_staging_before_step(optimizers, begun.staging_completion, before_step=before_step)
                begun = begun.upload_completion
            staging.save = begun
            self._in_flight.began(begun, path)
            self.newest = path
        except BaseException as exc:  # the other ranks hear of it first
            failure = exc
            # The engine tells the other ranks in the background, which the end of this process must not cut off.
            thread_runner.wait()
        all_began = all(ranks.all_gather("begin", lambda: failure is None))
        if failure is not None:
            raise failure
        if not all_began:
            self.finish()

    def _staging_for(
        self, kind: AsyncCheckpointerType, optimizers: list[Optimizer], changed_by_forward: list[torch.Tensor]
    ) -> _Staging:
        """Return a stager that no save in flight needs, with its memory, if there is one for the same things."""
        tensors = (optimizers, changed_by_forward) if self.options.overlap_staging else ((), ())
        earlier = self._staged_tensors
        is_same = _are_identical(tensors[0], earlier[0]) and _are_identical(tensors[1], earlier[1])
        if kind is not self._staged_kind or not is_same:
            # The memory of a save in flight cannot be taken from it.
            self.wait()
            self._free_stagers()
            self._staged_kind, self._staged_tensors = kind, tensors
        free = next((one for one in self._stagings if one.is_free), None)
        if free is None:
            free = _Staging(self._new_stager(kind, optimizers, changed_by_forward))
            self._stagings.append(free)
        return free

    def _new_stager(
        self, kind: AsyncCheckpointerType, optimizers: list[Optimizer], changed_by_forward: list[torch.Tensor]
    ) -> _Stager:
        in_process = kind is AsyncCheckpointerType.PROCESS
        if self.options.overlap_staging:
            return OverlappedStager(
                optimizers,
                changed_by_forward=changed_by_forward,
                use_shared_memory=in_process,
                watch_first=self._watch_first,
            )
        if in_process:
            return HandoverStager()
        return BlockingAsyncStager(cache_staged_state_dict=True)

    def _free_stagers(self) -> None:
        stagings, self._stagings = self._stagings, []
        # What they were made for would otherwise live as long as this object.
        self._staged_kind, self._staged_tensors = None, ((), ())
        for staging in stagings:
            staging.stager.close()


class _Writer(FileSystemWriter):
    """Replaces a checkpoint without a warning: whoever saves in numbered steps or under "last" does so on purpose."""

    warns_of_replacing = False


@contextmanager
def unwrapped_plan_errors(hint: str = "") -> Iterator[None]:
    """Raise the ``PlanError`` itself, on every rank, if a load has failed for no other reason.

    Users of a framework know the error of a model that does not fit; the tracebacks of all ranks would hide it.

    Args:
        hint: The last sentence of the error: what users of the framework can do. They cannot pass ``StateDictOptions``.
    """
    try:
        yield
    except PlanError as exc:
        raise _advised(exc, hint) from None
    except CheckpointException as exc:
        misfits = [failure for failure, _ in exc.failures.values() if isinstance(failure, PlanError)]
        if misfits and len(misfits) == len(exc.failures):
            raise _advised(misfits[0], hint) from None
        raise


def _advised(failure: PlanError, hint: str) -> PlanError:
    return failure.advised(hint) if hint else failure


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Silence what the engine warns of and a trainer does on purpose: a process alone, a checkpoint saved again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        warnings.filterwarnings("ignore", "Detected an existing checkpoint")
        yield


def _are_identical(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(one is other for one, other in zip(left, right, strict=True))


def renormed_weights(modules: Iterable[nn.Module]) -> Iterator[torch.Tensor]:
    """Yield the weights that a forward pass changes: of embeddings with ``max_norm``, which renormalise their rows."""
    for module in modules:
        for child in module.modules():
            if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) and child.max_norm is not None:
                yield child.weight
