"""The ``async`` case: what a save in the background costs the training loop, and how soon the checkpoint exists.

Each state is measured in a process of its own, in which the sides take turns: ours and stock torch, with the
background in a thread and in a process, and what they are held against: a plain copy of the same bytes, our
synchronous save, and the loop on its own.
"""

from __future__ import annotations

import gc
import itertools
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import click
import torch

import dcp_plugins as dcp
from dcp_plugins import plan, staging
from dcp_plugins.cli.bench import async_results
from dcp_plugins.cli.bench.async_results import (
    BLOCKED,
    COPY,
    DURABLE,
    FIRST,
    MAX_FILES,
    OURS_PROCESS,
    OURS_THREAD,
    RETURNED,
    SIDES,
    STEP_WAITS,
    STOCK_PROCESS,
    SYNC,
    AsyncResult,
)
from dcp_plugins.cli.bench.cases import STATE_CASES
from dcp_plugins.cli.bench.group import group_of_one
from dcp_plugins.cli.bench.measure import Samples, without_single_process_warnings
from dcp_plugins.cli.bench.memory import return_free_memory
from dcp_plugins.cli.bench.options import Options
from dcp_plugins.cli.bench.places import Place
from dcp_plugins.cli.bench.processes import WorkerError, run_workers
from dcp_plugins.cli.bench.state import blank_copy, check_loaded, local_tensors, on_device
from dcp_plugins.cli.stock import StockAsyncSaver
from dcp_plugins.engine import AsyncCheckpointerType, AsyncSaveResponse

__all__ = ["measure_async", "run_few_files", "run_state"]

_LOOP_WIDTH = 192
_LOOP_SECONDS = 0.5


def measure_async(
    options: Options, place: Place, directory: Path, progress: Callable[[str], None]
) -> Iterator[AsyncResult]:
    """Measure one state after the other; the directory is empty again afterwards."""
    for state in async_results.ASYNC_STATES:
        progress(f"async, {state}")
        flush = options.sync and not place.in_memory
        arguments = {"options": options.to_json(), "state": state, "directory": str(directory), "flush": flush}
        answer = run_workers("async", arguments)
        few_files = _try_few_files(arguments, progress) if state == "small" else {}
        yield AsyncResult(
            state=state, place=place, device=options.device, sync=options.sync, few_files=few_files, **answer
        )


def _try_few_files(arguments: dict[str, Any], progress: Callable[[str], None]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for side in (OURS_PROCESS, STOCK_PROCESS):
        progress(f"  {SIDES[side]}, with {MAX_FILES} file descriptors")
        try:
            found[side] = run_workers("async-few-files", {**arguments, "side": side})["failure"]
        except WorkerError as exc:
            found[side] = exc.format_message()
    return found


def run_state(arguments: dict[str, Any], _store: str | None) -> dict[str, Any]:
    """Measure one state in this process, which must be fresh."""
    with _in_a_group():
        return _Measurement(
            Options.from_json(arguments["options"]),
            arguments["state"],
            Path(arguments["directory"]),
            flush=arguments["flush"],
        ).run()


def run_few_files(arguments: dict[str, Any], _store: str | None) -> dict[str, Any]:
    """Save once in the background by one side, in this process, under a limit of few descriptors."""
    options = Options.from_json(arguments["options"])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FILES, hard))
    path = Path(arguments["directory"]) / "few-files"
    try:
        with _in_a_group(), _quiet():
            state = on_device(STATE_CASES[arguments["state"]].build(options.scale), options.device)
            _make(arguments["side"], options).save(state, path).result()
    # What stock torch fails with is a finding of the benchmark, whatever its class.
    except Exception as exc:
        return {"failure": _one_line(exc)}
    finally:
        shutil.rmtree(path, ignore_errors=True)
    return {"failure": None}


class _Saver(Protocol):
    def forget(self) -> None: ...
    def save(self, state: dict[str, Any], path: Path) -> Future[Any]: ...


class _OurSaver:
    def __init__(self, *, sync: bool, num_threads: int | None, in_process: bool) -> None:
        self._sync = sync
        self._num_threads = num_threads
        self._type = AsyncCheckpointerType.PROCESS if in_process else AsyncCheckpointerType.THREAD

    def forget(self) -> None:
        staging.release_staging_memory()
        plan.clear_cache()

    def save(self, state: dict[str, Any], path: Path) -> Future[Any]:
        writer = dcp.FileSystemWriter(path, sync_files=self._sync, thread_count=self._num_threads)
        response = dcp.async_save(state, storage_writer=writer, async_checkpointer_type=self._type)
        assert isinstance(response, Future)
        return response


def _make(side: str, options: Options) -> _Saver:
    in_process = side in (OURS_PROCESS, STOCK_PROCESS)
    if side in (OURS_THREAD, OURS_PROCESS):
        return _OurSaver(sync=options.sync, num_threads=options.num_threads, in_process=in_process)
    return StockAsyncSaver(sync=options.sync, in_process=in_process)


class _Measurement:
    def __init__(self, options: Options, state: str, directory: Path, *, flush: bool) -> None:
        self._options = options
        self._directory = directory
        self._flush = flush
        self._state = on_device(STATE_CASES[state].build(options.scale), options.device)
        self._tensors = local_tensors(self._state)
        self._loaded = blank_copy(self._state)
        self._copies = local_tensors(self._loaded) if options.device == "cpu" else _pinned_like(self._tensors)
        self._sides = {side: _make(side, options) for side in SIDES}
        self._seconds: Samples = {FIRST: {}, BLOCKED: {}, DURABLE: {}}
        self._rates: dict[str, list[float]] = {}
        self._failures: dict[str, str] = {}
        self._staged_bytes: dict[str, int] = {}

    def run(self) -> dict[str, Any]:
        for number in range(self._options.num_rounds + 1):
            _progress("warm-up" if number == 0 else f"round {number} of {self._options.num_rounds}")
            if number == 1:
                # What the warm-up found.
                self._seconds = {FIRST: {}, BLOCKED: {}, DURABLE: {}}
                self._rates = {}
            self._references()
            sides = list(self._sides)
            for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                self._turn(side, check=number == 0)
            self._overlapped_turn()
        return {
            "num_tensors": len(self._tensors),
            "num_bytes": sum(tensor.nbytes for tensor in self._tensors),
            "seconds": self._seconds,
            "step_rates": self._rates,
            "staged_bytes": self._staged_bytes,
            "failures": self._failures,
        }

    def _references(self) -> None:
        def copy() -> None:
            for target, source in zip(self._copies, self._tensors, strict=True):
                target.copy_(source, non_blocking=True)
            self._synchronize()

        path = self._directory / SYNC
        writer = dcp.FileSystemWriter(path, sync_files=self._options.sync, thread_count=self._options.num_threads)

        def save() -> None:
            dcp.save(self._state, storage_writer=writer)

        # The first of a round also plans: the turns before it have cleared the plans.
        save()
        shutil.rmtree(path)
        self._add(COPY, COPY, self._timed(copy)[0])
        self._add(SYNC, SYNC, self._timed(save)[0])
        shutil.rmtree(path)

    def _turn(self, side: str, *, check: bool) -> None:
        saver = self._sides[side]
        try:
            saver.forget()
            # Else a first save is one into memory that was given back a moment ago.
            return_free_memory()
            with _quiet() if check and side == STOCK_PROCESS else nullcontext():
                first, _ = self._save(saver, check=SIDES[side] if check else None)
            blocked, durable = self._save(saver)
            own, disturbed = self._step_rates(saver)
            if side in (OURS_THREAD, OURS_PROCESS):
                self._staged_bytes[side] = staging.staging_memory_bytes()
            saver.forget()
        # What a side fails with is a finding of the benchmark, whatever its class; that side is then left out.
        except Exception as exc:
            self._failures[side] = _one_line(exc)
            del self._sides[side]
            self._seconds = {
                measure: {name: samples for name, samples in sides.items() if name != side}
                for measure, sides in self._seconds.items()
            }
            self._rates.pop(side, None)
            _progress(f"  {SIDES[side]} failed: {self._failures[side]}")
            shutil.rmtree(self._directory / "background", ignore_errors=True)
            return
        self._add(FIRST, side, first)
        self._add(BLOCKED, side, blocked)
        self._add(DURABLE, side, durable)
        self._rates.setdefault(side, []).append(disturbed / own)

    def _save(self, saver: _Saver, check: str | None = None) -> tuple[float, float]:
        """Return the seconds until the call has returned and until the checkpoint exists."""
        path = self._directory / "background"
        blocked, (future, start) = self._timed(lambda: saver.save(self._state, path))
        future.result()
        durable = time.perf_counter() - start
        if check is not None:
            self._check(path, check)
        shutil.rmtree(path)
        return blocked, durable

    def _check(self, path: Path, what: str) -> None:
        dcp.load(self._loaded, storage_reader=dcp.FileSystemReader(path))
        check_loaded(self._state, self._loaded, f"saved by {what}")

    def _step_rates(self, saver: _Saver) -> tuple[float, float]:
        """Return the steps per second of a training loop on its own, and while a save is under way."""
        path = self._directory / "background"
        before = self._own_steps_per_second()
        _, (future, _) = self._timed(lambda: saver.save(self._state, path))
        with _one_thread():
            disturbed = self._steps_per_second(future.done)
        future.result()
        shutil.rmtree(path)
        # A machine that others use too changes its speed within seconds, by more than what a save costs.
        own = (before + self._own_steps_per_second()) / 2
        return own, disturbed

    def _own_steps_per_second(self) -> float:
        with _one_thread():
            start = time.perf_counter()
            return self._steps_per_second(lambda: time.perf_counter() - start > _LOOP_SECONDS)

    def _steps_per_second(self, is_over: Callable[[], bool]) -> float:
        """Return how often a loop gets round that looks at the result of each step, as a training does at its loss."""
        weight = torch.eye(_LOOP_WIDTH, device=self._options.device)
        value = torch.rand(_LOOP_WIDTH, _LOOP_WIDTH, device=self._options.device)
        num_steps = 0
        self._synchronize()
        start = time.perf_counter()
        while True:
            value = torch.relu(value @ weight)
            self._synchronize()
            num_steps += 1
            if is_over():
                return num_steps / (time.perf_counter() - start)

    def _synchronize(self) -> None:
        if self._options.device != "cpu":
            torch.accelerator.synchronize(torch.device(self._options.device))

    def _overlapped_turn(self) -> None:
        stager = staging.DefaultStager(staging.StagingOptions(torch.cuda.is_available(), False, True, False))
        path = self._directory / "background"

        def save() -> AsyncSaveResponse:
            writer = dcp.FileSystemWriter(path, sync_files=self._options.sync, thread_count=self._options.num_threads)
            response = dcp.async_save(self._state, storage_writer=writer, async_stager=stager)
            assert isinstance(response, AsyncSaveResponse)
            return response

        for number in range(2):
            returned, (response, start) = self._timed(save)
            response.staging_completion.result()
            waited = time.perf_counter() - start - returned
            response.upload_completion.result()
            shutil.rmtree(path)
            if number:
                self._add(RETURNED, RETURNED, returned)
                self._add(STEP_WAITS, STEP_WAITS, waited)
        stager.close()

    def _add(self, measure: str, side: str, seconds: float) -> None:
        self._seconds.setdefault(measure, {}).setdefault(side, []).append(seconds)

    def _timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Return the seconds of a call, and what it returned with the time at which it began."""
        if self._flush:
            os.sync()
        self._synchronize()
        gc.collect()
        if not self._options.collect_garbage:
            gc.disable()
        try:
            start = time.perf_counter()
            result = call()
            return time.perf_counter() - start, (result, start)
        finally:
            gc.enable()


@contextmanager
def _in_a_group() -> Iterator[None]:
    # Stock torch's process looks for it there, and else takes a name of this host that may not lead to it.
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    with without_single_process_warnings(), group_of_one():
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Have processes that are started meanwhile write nothing: stock torch's reports each of its steps."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch compute on one core, so that the background has one to spare on a machine of two."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _pinned_like(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return host tensors of the same shapes in page-locked memory that has been touched."""
    ends = list(itertools.accumulate(-(-tensor.nbytes // 64) * 64 for tensor in tensors))
    memory = torch.zeros(ends[-1], dtype=torch.uint8, pin_memory=True)
    return [
        memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(tensors, [0, *ends], strict=False)
    ]


def _one_line(exc: BaseException) -> str:
    text = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {text[:160]}"


def _progress(line: str) -> None:
    click.echo(f"  {line}", err=True)
