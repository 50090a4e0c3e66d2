"""How the background of a save shares the interpreter with the training beside it.

One thread at a time runs Python. Training lets go of the interpreter's lock for each operator; a thread that has Python
to run takes it then, and keeps it until the interpreter's switch interval (5 ms) is over: training makes one step where
it would have made fifty. So the background of a save runs Python in short turns and sleeps between them, many times
as long as it ran: a save takes more time, training loses no more by it, and no step waits for long. (A loop of ranks,
where each step waits for the slowest, would lose as much again for each rank whose turns came in one piece.)

Nothing of this happens once somebody waits for the save.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from dcp_plugins import progress

__all__ = [
    "Awaited",
    "elsewhere",
    "give_way",
    "giving_way",
    "hurry",
    "pace_of_this_thread",
    "paced",
    "shared_pace",
]

T = TypeVar("T")

_TURN_SECONDS = 0.001
# Training is promised nine tenths of its rate. Waking up and changing threads take as much again as the turns: a loop
# stood still for 5 % of the time so, and for 8 % with sleeps of fifteen times.
_SLEEP_PER_TURN = 24
# Bounds the harm of a long call that held no lock, and was not known to.
_MAX_SLEEP_SECONDS = 1.0
_BATCH = 256


class Awaited(threading.Event):
    """Whether somebody waits for a save: set once, and for good."""

    def __init__(self) -> None:
        super().__init__()
        self._shown_in: Any = None

    def set(self) -> None:
        # Its lock is not reentrant, and the handler of a signal may be here while the thread that it interrupts is.
        if not self.is_set():
            super().set()
        if (flag := self._shown_in) is not None:
            flag[0] = 1

    @contextmanager
    def shown_in(self, flag: Any) -> Iterator[None]:
        """Keep the first element of a buffer, which another process may read, at 1 if somebody waits, else at 0."""
        flag[0] = 0
        self._shown_in = flag
        # Somebody may have begun to between the two.
        if self.is_set():
            flag[0] = 1
        try:
            yield
        finally:
            self._shown_in = None


class _Team:
    """The threads that take turns for one save at the same time: each sleeps as many times longer as they are."""

    def __init__(self) -> None:
        self.num_threads = 0
        self._lock = threading.Lock()

    def change(self, by: int) -> None:
        with self._lock:
            self.num_threads += by


class _Pace:
    """The turns of one thread. Time is the thread's own on a processor: waiting for anything does not count."""

    __slots__ = ("awaited", "is_elsewhere", "ran_seconds", "since", "team")

    def __init__(self, awaited: Awaited, team: _Team) -> None:
        self.awaited = awaited
        self.team = team
        self.is_elsewhere = False
        self.ran_seconds = 0.0
        self.since = time.thread_time()

    def give_way(self) -> None:
        now = time.thread_time()
        self.ran_seconds += now - self.since
        self.since = now
        if self.ran_seconds >= _TURN_SECONDS:
            self.awaited.wait(min(self.ran_seconds * _SLEEP_PER_TURN * self.team.num_threads, _MAX_SLEEP_SECONDS))
            self.ran_seconds = 0.0
            self.since = time.thread_time()


_here = threading.local()


def paced(awaited: Awaited | None) -> AbstractContextManager[None]:
    """Run what is inside in turns, on this thread, until ``awaited`` is set; None runs it as ever."""
    return _paced(awaited, _Team())


@contextmanager
def _paced(awaited: Awaited | None, team: _Team) -> Iterator[None]:
    earlier: _Pace | None = getattr(_here, "pace", None)
    if earlier is not None and not earlier.is_elsewhere:
        earlier.ran_seconds += time.thread_time() - earlier.since
    _here.pace = None if awaited is None else _Pace(awaited, team)
    team.change(1)
    try:
        yield
    finally:
        team.change(-1)
        _here.pace = earlier
        if earlier is not None:
            # What ran inside was counted there.
            earlier.since = time.thread_time()


def pace_of_this_thread() -> Awaited | None:
    """Return the event that ends this thread's pace; None if it has none."""
    pace: _Pace | None = getattr(_here, "pace", None)
    return None if pace is None else pace.awaited


def shared_pace() -> Callable[[], AbstractContextManager[None]]:
    """Return what makes a thread keep this thread's pace, together with the others that do."""
    return functools.partial(_paced, pace_of_this_thread(), _Team())


def give_way() -> None:
    """Let training run if this thread has had its turn: called often by whatever may run Python for long."""
    progress.step()
    pace: _Pace | None = getattr(_here, "pace", None)
    if pace is not None:
        pace.give_way()


def giving_way(items: Iterable[T]) -> Iterable[T]:
    """Return the items for a loop over very many, which gives way from time to time."""
    return items if getattr(_here, "pace", None) is None else _giving_way(items)


def _giving_way(items: Iterable[T]) -> Iterator[T]:
    for number, item in enumerate(items):
        if not number % _BATCH:
            give_way()
        yield item


@contextmanager
def elsewhere() -> Iterator[None]:
    """Do not count what is inside: it computes without the interpreter's lock."""
    pace: _Pace | None = getattr(_here, "pace", None)
    if pace is None or pace.is_elsewhere:
        yield
        return
    pace.is_elsewhere = True
    pace.ran_seconds += time.thread_time() - pace.since
    try:
        yield
    finally:
        pace.since = time.thread_time()
        pace.is_elsewhere = False


def hurry() -> None:
    """End this thread's pace: somebody waits for what it does."""
    pace: _Pace | None = getattr(_here, "pace", None)
    if pace is not None:
        pace.awaited.set()
