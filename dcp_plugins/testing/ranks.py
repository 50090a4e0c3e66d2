"""Run a function on several real ranks of a gloo process group, with a hard deadline.

The ranks are processes forked from a server that has imported torch once, so that a 4-rank test costs tens of
milliseconds to start instead of seconds, and no thread pool of the test process is forked along.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

__all__ = ["RankError", "preload", "run_ranks"]

# The first optimizer that a process makes imports `torch._dynamo`: half a second for each rank.
_PRELOAD = ["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo", "dcp_plugins"]

# Once in some thousand groups a connection is refused while gloo makes its own.
_MAX_ATTEMPTS = 3
_MEETING_SECONDS = 20.0


class RankError(AssertionError):
    """Some rank raised, died or missed the deadline; the message holds every rank's traceback."""


def preload(*modules: str) -> None:
    """Start the server that ranks are forked from, unless it runs, and import modules in it once for all ranks.

    Args:
        modules: Names, beside those of torch and this package that it always imports.
    """
    forkserver.set_forkserver_preload([*_PRELOAD, *modules, "dcp_plugins.testing.frozen"])
    forkserver.ensure_running()


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_seconds: float = 60.0,
    collective_timeout_seconds: float = 30.0,
    expect_deaths: bool = False,
) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks of a gloo group and return the results, indexed by rank.

    Args:
        world_size: Number of processes.
        function: A module-level (picklable) function; its arguments and its result must be picklable too. Inside,
            ``torch.distributed`` is initialised and ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``
            are set.
        timeout_seconds: All ranks are killed when this has passed since they have met.
        collective_timeout_seconds: The process group's own timeout.
        expect_deaths: Return ``None`` for a rank that died without an answer instead of failing.

    Raises:
        RankError: A rank raised (its traceback is in the message), died, or missed the deadline; or the ranks could not
            meet in a group, three times.
    """
    preload()
    failure: str | None = None
    for _ in range(_MAX_ATTEMPTS):
        with tempfile.TemporaryDirectory(prefix="dcp_ranks_") as folder:
            processes, pipes = _start(
                world_size, os.path.join(folder, "store"), collective_timeout_seconds, function, args
            )
            try:
                failure = _await_meeting(pipes)
                if failure is None:
                    return _collect(processes, pipes, timeout_seconds, expect_deaths)
                # No rank has begun.
            finally:
                for process in processes:
                    if process.is_alive():
                        process.kill()
                    process.join()
    raise RankError(f"the ranks could not meet, {_MAX_ATTEMPTS} times: {failure}")


def _start(
    world_size: int, store_path: str, collective_timeout_seconds: float, function: Callable[..., Any], args: Any
) -> tuple[list[BaseProcess], dict[Connection, int]]:
    """Return the ranks' processes, and the ends of pipes to them with the ranks at the others."""
    context = multiprocessing.get_context("forkserver")
    processes: list[BaseProcess] = []
    pipes: dict[Connection, int] = {}
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        process: BaseProcess = context.Process(
            target=_rank_main,
            args=(rank, world_size, store_path, collective_timeout_seconds, theirs, function, args),
            daemon=False,
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes[ours] = rank
    return processes, pipes


def _await_meeting(pipes: dict[Connection, int]) -> str | None:
    """Wait until all ranks are in the group, and let them begin; return the first failure of one to get there."""
    for rank, failure in _messages(pipes, _MEETING_SECONDS):
        if failure is not None:
            return f"[rank {rank}] {failure}"
    for pipe in pipes:
        pipe.send(None)
    return None


def _messages(pipes: dict[Connection, int], timeout_seconds: float) -> Iterator[tuple[int, Any]]:
    """Yield each rank with its next message, in the order in which they come.

    Of a rank that has died that is an ``EOFError``, of one that sends none in time a ``TimeoutError``.
    """
    deadline = time.monotonic() + timeout_seconds
    pending = dict(pipes)
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            for rank in pending.values():
                yield rank, TimeoutError(f"no answer within {timeout_seconds} s")
            return
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pending.pop(pipe)
            try:
                message = pipe.recv()
            except EOFError:
                message = EOFError("died")
            yield rank, message


def _collect(
    processes: list[BaseProcess], pipes: dict[Connection, int], timeout_seconds: float, expect_deaths: bool
) -> list[Any]:
    results: list[Any] = [None] * len(processes)
    problems: dict[int, str] = {}
    for rank, answer in _messages(pipes, timeout_seconds):
        if isinstance(answer, TimeoutError):
            problems[rank] = str(answer)
        elif isinstance(answer, EOFError):
            processes[rank].join(timeout=5)
            if not expect_deaths:
                problems[rank] = f"died with exit code {processes[rank].exitcode}"
        else:
            ok, value = answer
            if ok:
                results[rank] = value
            else:
                problems[rank] = value
    if problems:
        raise RankError("\n".join(f"[rank {rank}] {problems[rank]}" for rank in sorted(problems)))
    return results


def _rank_main(
    rank: int,
    world_size: int,
    store_path: str,
    collective_timeout_seconds: float,
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        dist.init_process_group(
            "gloo",
            store=FileStore(store_path, world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=collective_timeout_seconds),
        )
    # Whatever it is, the ranks are started anew.
    except BaseException:
        pipe.send(traceback.format_exc())
        os._exit(0)
    pipe.send(None)
    pipe.recv()
    try:
        answer = (True, function(*args))
        payload = pickle.dumps(answer)
    # Whatever ends a rank is the answer its caller gets.
    except BaseException:
        payload = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(payload)
    pipe.close()
    # Skips interpreter teardown: a process group whose peers are gone may block in its destructor.
    os._exit(0)
