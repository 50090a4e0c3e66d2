"""The saves that go on in the background, and what may only happen once one of them is committed.

Deleting the checkpoint that a save replaces, or pointing a link at the new one, is noted here and done, in the order of
the calls, after the commit; if the save fails it is not done at all. So at every instant, a kill's too, the paths that
a framework knows lead to checkpoints that exist.
"""

from __future__ import annotations

import concurrent.futures
import logging
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from dcp_plugins.contract import Metadata
from dcp_plugins.engine.thread_runner import await_saves, thread_runner
from dcp_plugins.forks import in_forked_child
from dcp_plugins.manager.failed_saves import note_failure

__all__ = ["InFlight", "wait_for_all"]

log = logging.getLogger(__name__)


class InFlight:
    """The saves of one `Saver`: one being written, and perhaps one that waits; called on the thread that trains."""

    def __init__(self) -> None:
        self._saves: dict[Future[Metadata], Path] = {}
        self._steps: list[Future[None]] = []
        self._executor: ThreadPoolExecutor | None = None
        _live.add(self)

    def began(self, save: Future[Metadata], path: Path) -> None:
        """Note a save into a directory."""
        # The program may have changed its working directory when the save fails.
        path = path.absolute()
        self._saves[save] = path
        save.add_done_callback(partial(_note_if_failed, path))

    @property
    def is_any(self) -> bool:
        """Whether there are saves that nobody has finished, in flight or ended."""
        return bool(self._saves)

    @property
    def is_busy(self) -> bool:
        """Whether a save has begun and not ended."""
        return any(not save.done() for save in self._saves)

    def after_commit(self, step: Callable[[], None]) -> None:
        """Do something once the save that was begun last is committed, or now if none is in flight.

        What is put off runs on a thread; what fails there is logged, for no checkpoint depends on it.
        """
        self._steps = [future for future in self._steps if not future.done()]
        if not self._saves and not self._steps:
            step()
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="dcp-after-commit")
        self._steps.append(self._executor.submit(_run_after, next(reversed(self._saves), None), step))

    def wait(self) -> None:
        """Wait for the saves and for what was to follow them, whatever comes of them; failures stay to be raised."""
        await_saves(self._saves)
        for save, path in self._saves.items():
            # The save's thread may not have run its callback yet.
            _note_if_failed(path, save)
        concurrent.futures.wait(self._steps)

    def finish(self) -> None:
        """Wait for the saves and for what was to follow them; raise what they failed with, once."""
        # A signal may end this wait; the saves are still in flight then.
        self.wait()
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()
        self._steps = []
        saves, self._saves = self._saves, {}
        _raise_failure_of(saves)

    def finish_but_last(self) -> None:
        """Let the save that was begun last go on; wait for those before it, and raise what they failed with, once."""
        earlier = dict(self._saves)
        last = [earlier.popitem()] if earlier else []
        await_saves(earlier)
        self._saves = dict(last)
        _raise_failure_of(earlier)


def wait_for_all() -> None:
    """Wait for all saves that this process has in flight, and for what follows their commits.

    Their failures stay to be raised. What follows a commit may be another checkpoint, made of links to the same files.
    """
    thread_runner.wait()
    for one in list(_live):
        concurrent.futures.wait(one._steps)


_live: weakref.WeakSet[InFlight] = weakref.WeakSet()

# A forked child has none of the threads on which its parent's steps run: a wait for these steps would not end.
in_forked_child(_live.clear)


def _note_if_failed(path: Path, save: Future[Metadata]) -> None:
    # The base class's method: asking the future itself would count as having been told of the failure.
    failure = Future.exception(save)
    if failure is not None:
        note_failure(path, failure)


def _raise_failure_of(saves: dict[Future[Metadata], Path]) -> None:
    """Raise what the first save that failed has failed with, and log what later ones have; empties the dict."""
    failures = [failure for save in saves if (failure := save.exception()) is not None]
    for failure in failures[1:]:
        log.error("a save in the background failed after the one whose failure is raised", exc_info=failure)
    failure = failures[0] if failures else None
    # With any of these in this frame, the traceback would keep what was staged until the collector runs.
    saves.clear()
    failures.clear()
    if failure is not None:
        try:
            raise failure
        finally:
            del failure


def _run_after(save: Future[Metadata] | None, step: Callable[[], None]) -> None:
    if save is not None:
        concurrent.futures.wait([save])
        # The base class's method, as in `_note_if_failed`.
        if Future.exception(save) is not None:
            log.info("The save failed: what was to follow it (deleting what it replaces, a link to it) is not done")
            return
    try:
        step()
    # It must not look as if the checkpoint had failed, whatever it is that could not be deleted or linked.
    except Exception:
        log.warning("What was to follow a save that is committed failed", exc_info=True)
