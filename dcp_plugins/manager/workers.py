"""DataLoader workers and the signals that ask a training for a last save.

A scheduler may send its signal to every process of a job. A worker that dies of it takes the training along: the loader
raises in the process that was to save. So a forked worker lets those signals pass.

SIGTERM is also how Python ends the workers that are left when the program ends, and it waits for them. Which of the two
a SIGTERM means tells a pipe between the program and its workers, whose one end is closed when the program begins to
end. A second SIGTERM ends a worker in any case, so that the loader can get rid of one that hangs.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
from collections.abc import Collection
from types import FrameType
from typing import Any

from torch.utils.data._utils import signal_handling

__all__ = ["Lifeline", "shield_data_worker"]


class Lifeline:
    """Tells the children that a process forks when it begins to end, or has died."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        # Run before the handler by which multiprocessing ends its children, which was registered earlier.
        atexit.register(self._cut)

    @property
    def is_cut(self) -> bool:
        """In a child: whether the parent is ending or has ended."""
        poll = select.poll()
        poll.register(self._read, select.POLLIN | select.POLLHUP)
        return bool(poll.poll(0))

    def in_child(self) -> None:
        """In a child: let go of the parent's end. Every child has to, or the others would not hear of anything."""
        atexit.unregister(self._cut)
        self._cut()

    def _cut(self) -> None:
        os.close(self._write)

    def shield_if_data_worker(self, signals: Collection[signal.Signals]) -> None:
        """In a child: shield it as soon as it turns out to be a DataLoader worker, and not if it is anything else.

        The one function of torch's that a worker calls when it begins is replaced, in this child alone. Torch installs
        a handler of its own for SIGTERM there, and ours has to come after it.
        """
        begin: Any = signal_handling._set_worker_signal_handlers

        def begin_shielded() -> None:
            begin()
            shield_data_worker(signals=set(signals) - {signal.SIGTERM})
            if signal.SIGTERM in signals:
                signal.signal(signal.SIGTERM, self._pass_once)

        signal_handling._set_worker_signal_handlers = begin_shielded

    def _pass_once(self, signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)
        if self.is_cut:
            os._exit(0)


def shield_data_worker(worker_id: int = 0, *, signals: Collection[signal.Signals] = (signal.SIGUSR1,)) -> None:
    """Let a DataLoader worker outlive signals that ask for a save; usable as ``worker_init_fn``.

    Workers that are forked while a `Preemption` is active are shielded without it. It is for those that are started
    otherwise (``multiprocessing_context="spawn"`` or ``"forkserver"``) and inherit nothing; not for SIGTERM, by which
    Python ends them.
    """
    for signum in signals:
        signal.signal(signum, _pass)


def _pass(signum: int, frame: FrameType | None) -> None:
    """Do nothing. Not SIG_IGN, which programs started from here would inherit."""
