"""How many threads move bytes, and how they share the work."""

from __future__ import annotations

import heapq
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from dcp_plugins.pace import shared_pace

__all__ = [
    "MIN_PARALLEL_PIECE_BYTES",
    "SharedWork",
    "beside_training",
    "default_thread_count",
    "run_all",
    "split_by_bytes",
]

T = TypeVar("T")
R = TypeVar("R")

_MAX_DEFAULT_THREADS = 8
# Below this, a thread costs more than it brings.
_MIN_BYTES_PER_THREAD = 16 * 1024 * 1024
MIN_PARALLEL_PIECE_BYTES = 256 * 1024
"""Smaller pieces are bound by the interpreter, which one thread at a time holds: they do not ask for more threads."""
# A thread beside training that has waited for a processor for more than this part of a while gives up its place.
_CROWDED = 0.25
_WHILE_SECONDS = 0.01

_here = threading.local()


def default_thread_count() -> int:
    """Return the processors this rank may use, shared with the other ranks of its host, 8 at most.

    Launchers say how many ranks share the host in ``LOCAL_WORLD_SIZE``. One thread per processor measured fastest both
    ways, on tmpfs and on disk: a single one cannot fill the memory's bandwidth, more than processors only wait.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        local_ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except ValueError:
        local_ranks = 1
    return max(1, min(_MAX_DEFAULT_THREADS, processors // local_ranks))


def split_by_bytes(pieces: Sequence[T], sizes_bytes: Sequence[int], max_parts: int) -> list[list[T]]:
    """Share pieces out into at most ``max_parts`` lists of about equal bytes, each in the pieces' order.

    Fewer parts come back where there is too little to share; none of them is empty, unless there are no pieces.
    """
    parallel_bytes = sum(size for size in sizes_bytes if size >= MIN_PARALLEL_PIECE_BYTES)
    num_parts = max(1, min(max_parts, parallel_bytes // _MIN_BYTES_PER_THREAD))
    if num_parts == 1:
        return [list(pieces)] if pieces else []
    loads = [(0, part) for part in range(num_parts)]
    members: list[list[int]] = [[] for _ in range(num_parts)]
    for position in sorted(range(len(pieces)), key=lambda position: -sizes_bytes[position]):
        load, part = loads[0]
        members[part].append(position)
        heapq.heapreplace(loads, (load + sizes_bytes[position], part))
    return [[pieces[position] for position in sorted(part)] for part in members if part]


@contextmanager
def beside_training(is_awaited: Callable[[], bool]) -> Iterator[None]:
    """Let work that this thread shares out take one processor from the training, and others only if they are idle.

    Args:
        is_awaited: Whether somebody waits for the work: it may then take all processors.
    """
    _here.is_awaited = is_awaited
    try:
        yield
    finally:
        _here.is_awaited = None


class SharedWork(Generic[T]):
    """Pieces shared out to threads, each of which takes from the others' shares when its own is done.

    Made beside training, and while nobody waits for the work, all threads but that of the first share leave off when
    they find that they share a processor, at once and for good: what they would have done, the first does. (A lower
    priority instead, which would let them go on, can stop the training: a thread that holds the interpreter lock and
    gets no processor stops all that want it.)
    """

    def __init__(self, shares: Sequence[Sequence[T]]) -> None:
        # Their ends are popped from without a lock.
        self._shares = [deque(share) for share in shares]
        self._is_awaited: Callable[[], bool] | None = getattr(_here, "is_awaited", None)

    def take(self, share: int) -> Iterator[T]:
        """Yield the pieces of one share in order, then those at the other shares' ends, until none is left."""
        crowd = _Crowd(self._is_awaited) if share and self._is_awaited is not None else None
        own = self._shares[share]
        for pop, pieces in ((own.popleft, own), *((other.pop, other) for other in self._shares)):
            while pieces and not (crowd and crowd.is_here()):
                # Another thread may have taken the last one by now.
                try:
                    yield pop()
                except IndexError:
                    break

    def drop(self) -> None:
        """Let nobody take what is left."""
        for share in self._shares:
            share.clear()


def run_all(function: Callable[[T], R], work: Sequence[T]) -> list[R]:
    """Call ``function`` on each element, each in its own thread, and return the results in order.

    The first element is the calling thread's.

    Raises:
        BaseException: The first failure in the order of ``work``, once all have ended; none is lost or left running.
    """
    if len(work) <= 1:
        return [function(element) for element in work]
    pace = shared_pace()

    def keep_pace(element: T) -> R:
        with pace():
            return function(element)

    with ThreadPoolExecutor(len(work) - 1, thread_name_prefix="dcp-io") as pool:
        futures = [pool.submit(keep_pace, element) for element in work[1:]]
        # The calling thread would only wait: it takes the first part.
        first = keep_pace(work[0])
        return [first, *(future.result() for future in futures)]


class _Crowd:
    """Tells whether the thread that made it keeps training from a processor; for that thread alone.

    It does if it has to wait for one itself, and nobody waits for its work. (Without training a thread waits too now
    and then: two may start on the same processor, and be moved apart some milliseconds later.)

    Linux counts how long each thread was ready to run and did not (``schedstat`` in its documentation of scheduler
    statistics). Where nobody counts, there is always a crowd.
    """

    def __init__(self, is_awaited: Callable[[], bool]) -> None:
        self._is_awaited = is_awaited
        self._counter = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._since = time.monotonic()
        self._waited = self._waited_seconds()
        self._is_here = self._waited is None

    def is_here(self) -> bool:
        """Return whether there is a crowd, as far as is known from the last while; once there was one, there is."""
        if self._is_awaited():
            return False
        now = time.monotonic()
        elapsed = now - self._since
        if not self._is_here and elapsed > _WHILE_SECONDS:
            before, self._waited, self._since = self._waited, self._waited_seconds(), now
            self._is_here = before is None or self._waited is None or self._waited - before > _CROWDED * elapsed
        return self._is_here

    def _waited_seconds(self) -> float | None:
        try:
            return int(self._counter.read_text().split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            return None
