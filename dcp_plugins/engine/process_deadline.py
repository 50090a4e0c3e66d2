"""A deadline for a process that makes no progress: stopped by a signal, or stuck in a call that never returns."""

from __future__ import annotations

import time
from collections.abc import Callable

from dcp_plugins.processes import activity_of

__all__ = ["DEFAULT_SECONDS", "Deadline"]

# Gloo's own default, for a group that has no timeout that one could ask for.
DEFAULT_SECONDS = 1800.0
# A stopped process is told before the processes of other ranks, which wait for it, give up; so that all know the cause.
_SHARE_IF_STOPPED = 0.8
# Any other may wait for a process of another rank, and is to say so itself.
_SHARE_IF_WAITING = 1.2
# Longer between two checks, this process was stopped itself, perhaps with the whole job.
_MAX_GAP_SECONDS = 2.0


class Deadline:
    """Ends the waiting for a process that makes no progress.

    Once the process counts the steps of a save, only these are progress. Before, and where a writer of the user's does
    not count any, it makes progress if it uses a processor, reads or writes.

    Args:
        pid: The process.
        progress: Returns how many steps of saves it has made.
        seconds: How long it may make no progress, about: the timeout of the group that it is in.
    """

    def __init__(self, pid: int, progress: Callable[[], int], seconds: float = DEFAULT_SECONDS) -> None:
        self.seconds = seconds
        self._pid = pid
        self._progress = progress
        self._steps_before = 0
        self._seen: tuple[int, ...] = ()
        self._began = self._checked = time.monotonic()
        self._idle_seconds = 0.0

    def restart(self) -> None:
        """Note that something new is asked of the process."""
        self._steps_before = self._progress()

    def check(self, began: float) -> None:
        """Raise if the process has made no progress for too long; called about every second of the waiting.

        Args:
            began: When the waiting began, in seconds of the monotonic clock.

        Raises:
            TimeoutError: Says for how long.
        """
        try:
            state, activity = activity_of(self._pid)
        except OSError:
            return  # It has ended, which its end of a channel tells.
        now, steps = time.monotonic(), self._progress()
        seen = (steps,) if steps != self._steps_before else activity
        if seen != self._seen or began != self._began:
            self._seen, self._began, self._idle_seconds = seen, began, 0.0
        else:
            self._idle_seconds += min(now - self._checked, _MAX_GAP_SECONDS)
        self._checked = now
        is_stopped = state == "T"
        if self._idle_seconds > self.seconds * (_SHARE_IF_STOPPED if is_stopped else _SHARE_IF_WAITING):
            what = "been stopped" if is_stopped else "made no progress"
            raise TimeoutError(f"has {what} for {self._idle_seconds:.0f} seconds")
