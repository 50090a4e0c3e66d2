"""A deadline for a process that does nothing: stopped by a signal, or stuck in a call that never returns."""

from __future__ import annotations

import time

from dcp_plugins.processes import activity_of

__all__ = ["DEFAULT_SECONDS", "Deadline"]

# Gloo's own default, for a group that has no timeout that one could ask for.
DEFAULT_SECONDS = 1800.0
# A stopped process is told before the processes of other ranks, which wait for it, give up; so that all know the cause.
_SHARE_IF_STOPPED = 0.8
# Any other may wait for a process of another rank, and is to say so itself.
_SHARE_IF_WAITING = 1.2


class Deadline:
    """Ends the waiting for a process that makes no progress: uses no processor, reads and writes nothing.

    Args:
        pid: The process.
        seconds: How long it may do nothing, about: the timeout of the group that it is in.
    """

    def __init__(self, pid: int, seconds: float = DEFAULT_SECONDS) -> None:
        self.seconds = seconds
        self._pid = pid
        self._counters: tuple[int, ...] = ()
        self._changed = time.monotonic()

    def check(self, began: float) -> None:
        """Raise if the process has done nothing for too long.

        Args:
            began: When the waiting began, in seconds of the monotonic clock.

        Raises:
            TimeoutError: Says for how long.
        """
        try:
            state, counters = activity_of(self._pid)
        except OSError:
            return  # It has ended, which its end of a channel tells.
        now = time.monotonic()
        if counters != self._counters:
            self._counters, self._changed = counters, now
        is_stopped = state == "T"
        idle = now - max(began, self._changed)
        if idle > self.seconds * (_SHARE_IF_STOPPED if is_stopped else _SHARE_IF_WAITING):
            raise TimeoutError(f"has {'been stopped' if is_stopped else 'done nothing'} for {idle:.0f} seconds")
