"""The ``memory`` case: how much more memory a save or a load takes than the state dict, at its peak.

Each figure comes from a fresh process that does one save or one load, after a save or load of a single small tensor
has brought in code and threads. Memory is read from ``/proc``, so the case needs Linux. Two readings are taken:
``RssAnon`` sampled by a thread, and the kernel's own high-water mark of everything resident (``VmHWM``), which misses
no peak but also counts pages of mapped files. Files on tmpfs count in neither unless they are mapped.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from dcp_plugins.cli.bench.cases import STATE_CASES
from dcp_plugins.cli.bench.measure import without_single_process_warnings
from dcp_plugins.cli.bench.options import Options
from dcp_plugins.cli.bench.processes import run_workers
from dcp_plugins.cli.bench.runners import Runner, make_ours, make_stock
from dcp_plugins.cli.bench.state import blank_copy, check_loaded

__all__ = ["PeakBytes", "is_supported", "measure_peaks", "return_free_memory", "run_child"]

PeakBytes = dict[str, dict[str, dict[str, int | None]]]
"""Direction -> side -> reading (``anonymous``, ``resident``) -> bytes beyond what was there before."""

_STATUS, _STATM, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/statm"), Path("/proc/self/clear_refs")
# Written to clear_refs, makes VmHWM start again from the present value.
_RESET_HIGH_WATER = "5"
_SAMPLE_SECONDS = 0.001
_SIDES = {"ours": make_ours, "stock": make_stock}


def is_supported() -> bool:
    """Whether this machine says how much memory a process uses."""
    return _STATM.exists()


def measure_peaks(options: Options, directory: Path, progress: Callable[[str], None]) -> PeakBytes:
    """Return the peaks of both sides; the directory is empty again afterwards."""
    peaks: PeakBytes = {"save": {}, "load": {}}
    for side in _SIDES:
        checkpoint = directory / side
        for direction in ("save", "load"):
            progress(f"{direction} by {side}")
            arguments = {
                "options": options.to_json(),
                "side": side,
                "direction": direction,
                "checkpoint": str(checkpoint),
            }
            peaks[direction][side] = run_workers("memory", arguments)
        shutil.rmtree(checkpoint)
    return peaks


def run_child(arguments: dict[str, Any], _store: str | None) -> dict[str, Any]:
    """Measure one save or load in this process, which must be fresh."""
    options = Options.from_json(arguments["options"])
    checkpoint = Path(arguments["checkpoint"])
    runner = _SIDES[arguments["side"]](options, no_dist=True)
    build = functools.partial(STATE_CASES["big"].build, options.scale)
    with without_single_process_warnings():
        _warm_up(runner, checkpoint.with_name("warm-up"))
        if arguments["direction"] == "save":
            return _save_peak(runner, build(), checkpoint)
        target = blank_copy(build())
        peak = _peak(lambda: runner.load(target, checkpoint))
    check_loaded(build(), target, f"saved and loaded by {runner.name}")
    return peak


def _save_peak(runner: Runner, state: dict[str, Any], checkpoint: Path) -> dict[str, int | None]:
    return _peak(lambda: runner.save(state, checkpoint))


def _warm_up(runner: Runner, path: Path) -> None:
    runner.save({"weight": torch.ones(1024)}, path)
    runner.load({"weight": torch.zeros(1024)}, path)
    shutil.rmtree(path)
    runner.forget()


def _peak(call: Callable[[], None]) -> dict[str, int | None]:
    gc.collect()
    return_free_memory()
    anonymous_before, resident_before = _anonymous_bytes(), _status_bytes("VmRSS")
    can_reset = _reset_high_water()
    highest = anonymous_before
    done = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not done.wait(_SAMPLE_SECONDS):
            highest = max(highest, _anonymous_bytes())

    sampler = threading.Thread(target=sample, name="dcp-bench-memory")
    sampler.start()
    try:
        call()
    finally:
        done.set()
        sampler.join()
    resident_peak = _status_bytes("VmHWM")
    return {
        "anonymous": highest - anonymous_before,
        "resident": max(0, resident_peak - resident_before) if can_reset else None,
    }


def return_free_memory() -> None:
    """Give freed memory back to the system where the C library can: reusing it would hide what the call takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_high_water() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER)
    except OSError as exc:
        click.echo(f"the high-water mark cannot be reset here ({exc}); only sampled memory is reported", err=True)
        return False
    return True


def _anonymous_bytes() -> int:
    _, resident, shared, *_ = os.fsdecode(_STATM.read_bytes()).split()
    return (int(resident) - int(shared)) * resource.getpagesize()


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise click.ClickException(f"{_STATUS} has no field {field}: the memory case cannot run on this system")
