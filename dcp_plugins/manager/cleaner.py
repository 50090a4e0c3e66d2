"""Deleting checkpoints that are not kept, in the background, on rank 0."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from dcp_plugins.errors import CheckpointError
from dcp_plugins.manager.directory import StepNames, committed_steps, remove_if_uncommitted, uncommitted_steps
from dcp_plugins.manager.guard import delete_unless_read
from dcp_plugins.manager.record import SaveRecord, read_record
from dcp_plugins.manager.retention import KeepPolicy, Selection

__all__ = ["Cleaner"]

log = logging.getLogger(__name__)


class Cleaner:
    """Applies a keep policy to a directory of steps, and remembers which steps must not be deleted at the moment.

    Args:
        root: The directory.
        names: How the steps in it are called.
        policy: Which to keep; None keeps all.
    """

    def __init__(self, root: Path, names: StepNames, policy: KeepPolicy | None) -> None:
        self._root = root
        self._names = names
        self._policy = policy
        self._last_begun: int | None = None
        """The step of the last save that was begun, committed or not."""
        self._in_flight: set[int] = set()
        """The steps of the saves that have begun and are not known to be committed: two, if one is queued."""
        self._selection = Selection()
        # Held while steps are deleted, and while a restore chooses and reads one.
        self._deletion_lock = threading.Lock()
        self._records: dict[int, SaveRecord] = {}
        self._executor: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []

    def start(self, step: int) -> None:
        """Delete what is not kept, on a thread. Called after the commit of a step, on rank 0."""
        self._in_flight.discard(step)
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="dcp-cleaner")
        self._jobs = [job for job in self._jobs if not job.done()]
        self._jobs.append(self._executor.submit(self._clean))

    def wait(self) -> None:
        """Wait for the deletions that have been started."""
        concurrent.futures.wait(self._jobs)

    def close(self) -> None:
        """Wait as `wait` does, and end the thread."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()
        self._jobs = []

    def begin(self, step: int, *, is_queued: bool) -> None:
        """Note the step that is about to be saved, perhaps once more, and forget its old record.

        On return, no deletion of that step is running, and none will begin.

        Args:
            step: Its number.
            is_queued: Whether the save that was begun last is in flight; none is otherwise.
        """
        for outdated in (self._last_begun, step):
            if outdated is not None:
                self._records.pop(outdated, None)
        self._in_flight &= {self._last_begun} if is_queued else set()
        self._in_flight.add(step)
        self._last_begun = step
        if (self._root / self._names.name(step)).exists():
            self.wait()

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Delete nothing during the block: a step is chosen, and then read by all ranks."""
        with self._deletion_lock:
            yield

    def name_best(self) -> int | None:
        """Return the best step by the policy, if there is one; it stays until another is named."""
        return self._selection.name_best(self._policy, self._records_but)

    def _records_but(self, excluded: Collection[int]) -> list[SaveRecord]:
        """Return the records of the committed steps, ascending, without steps that are excluded or unreadable."""
        found = []
        for step in committed_steps(self._root, self._names):
            if step in excluded:
                continue
            try:
                found.append(self.record(step))
            except (CheckpointError, OSError) as exc:
                log.warning("step %d in %s cannot be read, and is left alone: %s", step, self._root, exc)
        return found

    def record(self, step: int) -> SaveRecord:
        """Return what a committed checkpoint says about itself, as read the first time."""
        # Another thread may delete the entry at any time.
        known = self._records.get(step)
        if known is None or step in self._unsettled:
            known = self._records[step] = read_record(self._root / self._names.name(step), step)
        return known

    @property
    def _unsettled(self) -> set[int]:
        """The steps that a save may be writing, and the step that was saved last."""
        return self._in_flight if self._last_begun is None else {*self._in_flight, self._last_begun}

    def _clean(self) -> None:
        try:
            with self._deletion_lock:
                self._delete_unkept()
        # The save is committed: an error of the deletion must not make it fail, whatever the error is.
        except Exception:
            log.warning("could not delete what is not kept in %s; the next save tries again", self._root, exc_info=True)

    def _delete_unkept(self) -> None:
        with self._selection.choosing_unkept(self._policy, self._records_but, protected=self._unsettled) as unkept:
            for step in unkept:
                with self._logging_failure(step):
                    self._delete(step)
        newest = max(committed_steps(self._root, self._names), default=-1)
        for step in uncommitted_steps(self._root, self._names):
            # A later step may be a save of another job, which is running.
            if step < newest and step not in self._unsettled:
                with self._logging_failure(step):
                    remove_if_uncommitted(self._root / self._names.name(step))

    def _delete(self, step: int) -> None:
        path = self._root / self._names.name(step)
        if delete_unless_read(path):
            self._records.pop(step, None)
            log.info("Deleted %s, which is not kept", path)
        else:
            log.info("%s is being read: it is deleted later", path)

    @contextmanager
    def _logging_failure(self, step: int) -> Iterator[None]:
        """Log why one step could not be deleted, and go on: the disk would fill up with the other steps."""
        try:
            yield
        except OSError:
            path = self._root / self._names.name(step)
            log.warning("could not delete %s, which is not kept; the next save tries again", path, exc_info=True)
