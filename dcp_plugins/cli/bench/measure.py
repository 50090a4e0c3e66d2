"""How every case is timed: sides take turns in one process, on fresh directories, and each load is checked."""

from __future__ import annotations

import gc
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from dcp_plugins.cli.bench.limits import Limit
from dcp_plugins.cli.bench.runners import Runner
from dcp_plugins.cli.bench.state import check_loaded, erase

__all__ = [
    "FIRST_SAVE",
    "LIMIT",
    "LOAD",
    "SAVE",
    "Alone",
    "Samples",
    "Together",
    "measure",
    "without_single_process_warnings",
]

FIRST_SAVE, SAVE, LOAD = "first_save", "repeated_save", "load"
LIMIT = "limit"

Samples = dict[str, dict[str, list[float]]]
"""Measure -> side -> seconds, one per round; sample ``i`` of every side is from the same round."""


class Together(Protocol):
    """The processes that measure one case together."""

    is_first: bool
    """Whether this process makes and removes directories and reports progress."""

    def barrier(self) -> None:
        """Wait for every process."""

    def slowest(self, seconds: float) -> float:
        """Return the largest of the processes' values, to all of them."""


class Alone:
    """A single process."""

    is_first = True

    def barrier(self) -> None:
        """Return at once."""

    def slowest(self, seconds: float) -> float:
        return seconds


def measure(
    state: dict[str, Any],
    target: dict[str, Any],
    runners: Sequence[Runner],
    limit: Limit,
    directory: Path,
    *,
    num_rounds: int,
    flush: bool,
    collect_garbage: bool,
    together: Together,
    progress: Callable[[str], None],
) -> Samples:
    """Return the seconds of first saves, repeated saves and loads of every runner and of the limit.

    A round gives each side one turn, and the side that begins changes from round to round. The first round warms up
    and is not counted; in it, the last runner also loads what the others saved, to show that the files are the same
    format.

    Args:
        state: What is saved.
        target: A blank copy of it, which is loaded into and checked after each load.
        runners: The sides; ours first, and last the reference that cross-checks the others.
        limit: The bare system calls over the same tensors.
        directory: An existing directory, seen by every process; empty again at the end.
        num_rounds: Timed rounds.
        flush: Flush the machine's dirty pages before each timed save. For storage where a sync costs something: what
            one side left behind must not be paid by the next.
        collect_garbage: Leave the garbage collector on in the timed parts.
        together: The processes that take part; a sample is the time of the slowest.
        progress: Called on the first process with a line for each round.
    """
    turns = _Turns(
        state,
        target,
        directory,
        flush=flush,
        collect_garbage=collect_garbage,
        together=together,
    )
    samples: Samples = {FIRST_SAVE: {}, SAVE: {}, LOAD: {}}
    sides: list[Runner | Limit] = [*runners, limit]
    with without_single_process_warnings(), nullcontext() if collect_garbage else _quick_collections():
        for round_index in range(num_rounds + 1):
            warm_up = round_index == 0
            if together.is_first:
                progress("warm-up" if warm_up else f"round {round_index} of {num_rounds}")
            first = round_index % len(sides)
            for side in sides[first:] + sides[:first]:
                if isinstance(side, Limit):
                    name, seconds = LIMIT, turns.limit_turn(side)
                else:
                    checker = runners[-1] if warm_up and side is not runners[-1] else None
                    name, seconds = side.name, turns.runner_turn(side, checker)
                if not warm_up:
                    for measure_name, value in seconds.items():
                        samples[measure_name].setdefault(name, []).append(value)
    return samples


@contextmanager
def without_single_process_warnings() -> Iterator[None]:
    """Keep the report clean: both sides warn when there is no process group, also when told ``no_dist``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Keep what exists already out of the collections before each timed call: torch alone takes 0.1 s to walk."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Turns:
    """One side's part of a round, with everything around the timed calls kept out of the time."""

    def __init__(
        self,
        state: dict[str, Any],
        target: dict[str, Any],
        directory: Path,
        *,
        flush: bool,
        collect_garbage: bool,
        together: Together,
    ) -> None:
        self._state = state
        self._target = target
        self._directory = directory
        self._flush = flush
        self._collect_garbage = collect_garbage
        self._together = together

    def runner_turn(self, runner: Runner, cross_checker: Runner | None) -> dict[str, float]:
        path = self._directory / runner.name
        runner.forget()
        seconds = {FIRST_SAVE: self._timed_save(lambda: runner.save(self._state, path))}
        if runner.caches_plans:
            self._remove(path)
            seconds[SAVE] = self._timed_save(lambda: runner.save(self._state, path))
        else:
            seconds[SAVE] = seconds[FIRST_SAVE]
        erase(self._target)
        seconds[LOAD] = self._timed(lambda: runner.load(self._target, path))
        check_loaded(self._state, self._target, f"saved and loaded by {runner.name}")
        if cross_checker is not None:
            erase(self._target)
            cross_checker.load(self._target, path)
            check_loaded(self._state, self._target, f"saved by {runner.name}, loaded by {cross_checker.name}")
        self._remove(path)
        return seconds

    def limit_turn(self, limit: Limit) -> dict[str, float]:
        path = self._directory / LIMIT
        if self._together.is_first:
            path.mkdir()
        save = self._timed_save(lambda: limit.save(path))
        erase(self._target)
        load = self._timed(lambda: limit.load(path))
        self._remove(path)
        # One figure stands beside both kinds of save: bytes do not know whether they are saved for the first time.
        return {FIRST_SAVE: save, SAVE: save, LOAD: load}

    def _timed_save(self, call: Callable[[], None]) -> float:
        if self._flush and self._together.is_first:
            os.sync()
        return self._timed(call)

    def _timed(self, call: Callable[[], None]) -> float:
        gc.collect()
        if not self._collect_garbage:
            gc.disable()
        try:
            self._together.barrier()
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
        finally:
            gc.enable()
        return self._together.slowest(seconds)

    def _remove(self, path: Path) -> None:
        self._together.barrier()
        if self._together.is_first:
            shutil.rmtree(path)
        self._together.barrier()
