"""Being asked to stop: a signal becomes a request for one last save, which all ranks make at the same step."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from dcp_plugins.coord import Ranks
from dcp_plugins.errors import listing
from dcp_plugins.forks import in_forked_child
from dcp_plugins.manager.agreement import deciding_ranks
from dcp_plugins.manager.workers import Lifeline

__all__ = ["Preemption"]

log = logging.getLogger(__name__)


class Preemption:
    """Listens for the signals by which schedulers announce the end of a job; made on the main thread.

    The first signal, on whatever rank, is noted; at the next `check`, which all ranks make at the same step, all of
    them know. A handler that was there before is called, too. The same signal once more means that somebody does not
    want to wait: the handler that was there before is put back, and gets it; where there was none, the process ends.

    Python runs handlers between two of its instructions: a rank that is inside a collective notices a signal when that
    returns.

    DataLoader workers that are forked while this is active are shielded from the signals, see `shield_data_worker`;
    other forked processes have the handlers that were there before.

    Args:
        signals: What to listen for. By default what SLURM and others send before they kill: SIGTERM, and SIGUSR1,
            which ``sbatch --signal=USR1@120`` asks for.
        repeat_after_seconds: How long the same signal counts as the first one still: a scheduler may signal every
            process of a job, and the launcher forward it once more.
        process_group: The ranks that agree; None takes the default group.
        no_dist: There is this process alone.

    Raises:
        RuntimeError: Not on the main thread, where alone Python lets handlers be set; or one is active already.
        ValueError: A signal that cannot be caught.
    """

    def __init__(
        self,
        signals: Iterable[signal.Signals | int] = (signal.SIGTERM, signal.SIGUSR1),
        *,
        repeat_after_seconds: float = 2.0,
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
    ) -> None:
        self.signals = tuple(signal.Signals(signum) for signum in signals)
        self._repeat_after_seconds = repeat_after_seconds
        self._process_group = process_group
        self._no_dist = no_dist
        self._requested = False
        self._first: dict[int, float] = {}
        """Monotonic time of each signal's first coming."""
        self._previous: dict[int, Any] = {}
        uncatchable = {signal.SIGKILL, signal.SIGSTOP} & set(self.signals)
        if uncatchable:
            raise ValueError(f"signals must be such that can be caught, got {listing(s.name for s in uncatchable)}")
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "Preemption must be made on the main thread, the only one where Python sets signal handlers. Make it"
                f" where the program starts; this is thread {threading.current_thread().name!r}"
            )
        if _active:
            raise RuntimeError("a Preemption is active already: close it first, or use one for the whole program")
        # One object, so that it can be recognised among handlers.
        self._handler: Callable[[int, FrameType | None], None] = self._on_signal
        for signum in self.signals:
            self._previous[signum] = signal.signal(signum, self._handler)
        _active.append(self)
        if not _lifelines:
            _lifelines.append(Lifeline())

    @property
    def signalled(self) -> bool:
        """Whether a signal has come to this process."""
        return bool(self._first)

    @property
    def requested(self) -> bool:
        """Whether all ranks know that a save is asked for: what the last `check` has agreed on."""
        return self._requested

    def check(self) -> bool:
        """Agree whether a signal has come to some rank; all ranks call this together.

        Costs one small exchange over gloo, and nothing once the answer is yes.
        """
        if not self._requested:
            ranks = deciding_ranks(self._process_group, no_dist=self._no_dist)
            self.settle(ranks.any_of("preemption", [self.signalled])[0], ranks)
        return self._requested

    def settle(self, requested: bool, ranks: Ranks) -> None:
        """Note what all ranks have agreed on in an exchange of the caller's."""
        if requested and not self._requested:
            self._requested = True
            if self.signalled:
                names = listing(signal.Signals(signum).name for signum in self._first)
                log.warning("rank %d was signalled (%s): all ranks save and may stop", ranks.rank, names)

    def close(self) -> None:
        """Put back the handlers that were there before, but for those that somebody has replaced since."""
        if self not in _active:
            return
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("Preemption must be closed on the main thread, where it was made")
        _active.remove(self)
        self._restore(self.signals)

    def __enter__(self) -> Preemption:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        # Nothing is logged here: the main thread may be in the midst of a write to the same stream.
        now = time.monotonic()
        previous = self._previous.get(signum)
        if signum not in self._first:
            self._first[signum] = now
            # Python's handler of Ctrl-C would end the program, which is not to end yet.
            if callable(previous) and previous is not signal.default_int_handler:
                previous(signum, frame)
        elif now - self._first[signum] >= self._repeat_after_seconds:
            self._restore([signal.Signals(signum)])
            os.kill(os.getpid(), signum)

    def _restore(self, signals: Iterable[signal.Signals]) -> None:
        for signum in signals:
            if signal.getsignal(signum) is self._handler:
                previous = self._previous[signum]
                # None stands for a handler that was not set from Python, and cannot be.
                signal.signal(signum, signal.SIG_DFL if previous is None else previous)

    def _in_forked_child(self, lifeline: Lifeline) -> None:
        self._restore(self.signals)
        self._first = {}
        lifeline.shield_if_data_worker(self.signals)


_active: list[Preemption] = []  # one at most
_lifelines: list[Lifeline] = []  # one at most: this process's, for good


def _after_fork() -> None:
    while _lifelines:
        lifeline = _lifelines.pop()
        lifeline.in_child()
        while _active:
            _active.pop()._in_forked_child(lifeline)


in_forked_child(_after_fork)
