"""How many threads move bytes, and how they share the work."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["default_thread_count", "run_all", "split_by_bytes"]

T = TypeVar("T")
R = TypeVar("R")

_MAX_DEFAULT_THREADS = 8
# Below this, a thread costs more than it brings.
_MIN_BYTES_PER_THREAD = 16 * 1024 * 1024
# Smaller pieces are bound by the interpreter, which one thread at a time holds: they do not ask for more threads.
_MIN_PARALLEL_PIECE_BYTES = 256 * 1024


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
    parallel_bytes = sum(size for size in sizes_bytes if size >= _MIN_PARALLEL_PIECE_BYTES)
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


def run_all(function: Callable[[T], R], work: Sequence[T]) -> list[R]:
    """Call ``function`` on each element, each in its own thread, and return the results in order.

    Raises:
        BaseException: The first failure in the order of ``work``, once all have ended; none is lost or left running.
    """
    if len(work) <= 1:
        return [function(element) for element in work]
    with ThreadPoolExecutor(len(work) - 1, thread_name_prefix="dcp-io") as pool:
        futures = [pool.submit(function, element) for element in work[1:]]
        # The calling thread would only wait: it takes the first part.
        first = function(work[0])
        return [first, *(future.result() for future in futures)]
