"""The save that goes on in the background, and what may only happen once it is committed.

Deleting the checkpoint that a save replaces, or pointing a link at the new one, is noted here and done, in the order of
the calls, after the commit; if the save fails it is not done at all. So at every instant, a kill's too, the paths that
a framework knows lead to checkpoints that exist.
"""

from __future__ import annotations

import concurrent.futures
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from dcp_plugins.contract import Metadata

__all__ = ["InFlight"]

log = logging.getLogger(__name__)


class InFlight:
    """The last save of one `Saver`; called on the thread that trains."""

    def __init__(self) -> None:
        self._save: Future[Metadata] | None = None
        self._steps: list[Future[None]] = []
        self._executor: ThreadPoolExecutor | None = None

    def began(self, save: Future[Metadata]) -> None:
        """Note a save; the one before has been finished."""
        self._save = save

    @property
    def is_busy(self) -> bool:
        """Whether a save has begun and not ended."""
        return self._save is not None and not self._save.done()

    def after_commit(self, step: Callable[[], None]) -> None:
        """Do something once the save in flight is committed, or now if there is none.

        What is put off runs on a thread; what fails there is logged, for no checkpoint depends on it.
        """
        self._steps = [future for future in self._steps if not future.done()]
        if self._save is None and not self._steps:
            step()
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="dcp-after-commit")
        self._steps.append(self._executor.submit(_run_after, self._save, step))

    def wait(self) -> None:
        """Wait for the save and for what was to follow it, whatever comes of it; a failure stays to be raised."""
        if self._save is not None:
            concurrent.futures.wait([self._save])
        concurrent.futures.wait(self._steps)

    def finish(self) -> None:
        """Wait for the save and for what was to follow it; raise what the save failed with, once."""
        # A signal may end this wait; the save is still in flight then.
        self.wait()
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()
        self._steps = []
        save, self._save = self._save, None
        if save is not None:
            save.result()


def _run_after(save: Future[Metadata] | None, step: Callable[[], None]) -> None:
    if save is not None:
        concurrent.futures.wait([save])
        # The base class's method: asking the future itself would count as having been told of the failure.
        if Future.exception(save) is not None:
            log.info("The save failed: what was to follow it (deleting what it replaces, a link to it) is not done")
            return
    try:
        step()
    # It must not look as if the checkpoint had failed, whatever it is that could not be deleted or linked.
    except Exception:
        log.warning("What was to follow a save that is committed failed", exc_info=True)
