"""Runs cases in forked children: a bad file that crashes or hangs the interpreter does not end the campaign."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.torture.campaign import Campaign

__all__ = ["Cost", "check_in_children", "run_in_children"]

T = TypeVar("T")

_HANG_SECONDS = 120
_FREE_SECONDS, _SECONDS_PER_BYTE = 4.0, 20e-6
_FREE_BYTES, _BYTES_PER_BYTE = 128 << 20, 400


class Cost:
    """Measures what this process takes, from when it is made: processors' time, and memory beyond its peak before."""

    def __init__(self) -> None:
        self._seconds = time.process_time()
        self._peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def excess(self, length: int) -> str:
        """Return what is more than it may take to read bytes of this length; an empty text if nothing is."""
        seconds = time.process_time() - self._seconds
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._peak) << 10
        if seconds > _FREE_SECONDS + _SECONDS_PER_BYTE * length:
            return f"{seconds:.1f} s for {length} bytes"
        if grown > _FREE_BYTES + _BYTES_PER_BYTE * length:
            return f"{grown} bytes of memory for {length} bytes"
        return ""


def check_in_children(
    campaign: Campaign,
    cases: list[T],
    kind: Callable[[T], str],
    prepare: Callable[[Path], Any],
    check: Callable[[Any, T], None],
) -> None:
    """Check every case in a child, as `run_in_children`, and count it in the campaign under its kind."""
    # Children share the work: without this, one of them would have all the slow loads.
    campaign.random.shuffle(cases)
    # Some frameworks collect garbage in a load: without this, each collection would walk all that was imported.
    gc.freeze()
    for case, problem in run_in_children(cases, prepare, check, campaign.folder / "work"):
        with campaign.case(kind(case), str(case)):
            assert not problem, problem


def run_in_children(
    cases: Sequence[T], prepare: Callable[[Path], Any], check: Callable[[Any, T], None], folder: Path
) -> Iterator[tuple[T, str]]:
    """Check every case in a child, and yield each case with what broke a promise; an empty text if nothing did.

    Args:
        cases: They are shared out among as many children as there are processors.
        prepare: Called once in each child with a directory of its own; makes what ``check`` works on.
        check: Called with that and a case; raises where a promise is broken.
        folder: For the children's directories.
    """
    folder.mkdir()
    number = min(os.cpu_count() or 1, len(cases))
    left = [list(range(at, len(cases), number)) for at in range(number)]
    num_started = 0
    while any(left):
        running = []
        for todo in filter(None, left):
            own = folder / str(num_started)
            num_started += 1
            running.append((_start(own, todo, cases, prepare, check), own.with_suffix(".log"), todo))
        for pid, log, todo in running:
            _, status = os.waitpid(pid, 0)
            begun = None
            for line in log.read_text().splitlines():
                begun, problem = json.loads(line)
                if problem is not None:
                    todo.remove(begun)
                    yield cases[begun], problem
            if status and begun not in todo:
                raise RuntimeError(f"a child of the campaign failed outside its cases (status {status}); see {log}")
            if status:
                # The others of its cases get a new child.
                todo.remove(begun)
                yield cases[begun], _ending(status)


def _ending(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return f"the interpreter ended with status {os.waitstatus_to_exitcode(status)}"
    if os.WTERMSIG(status) == signal.SIGALRM:
        return f"the case hung for {_HANG_SECONDS} seconds"
    return f"the interpreter crashed: {signal.Signals(os.WTERMSIG(status)).name}"


def _start(
    folder: Path,
    todo: Sequence[int],
    cases: Sequence[T],
    prepare: Callable[[Path], Any],
    check: Callable[[Any, T], None],
) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    # The child: it never returns.
    status = 1
    try:
        folder.mkdir()
        with folder.with_suffix(".log").open("w", buffering=1) as log:
            # What frameworks print would bury the campaign's own report. What is printed outside the cases is kept.
            for stream in (sys.stdout, sys.stderr):
                os.dup2(os.open(folder.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
            faulthandler.disable()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            prepared = prepare(folder)
            for at in todo:
                log.write(json.dumps([at, None]) + "\n")
                signal.alarm(_HANG_SECONDS)
                problem = _problem(check, prepared, cases[at])
                signal.alarm(0)
                log.write(json.dumps([at, problem]) + "\n")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _problem(check: Callable[[Any, T], None], prepared: Any, case: T) -> str:
    try:
        check(prepared, case)
    except AssertionError as exc:
        return str(exc) or traceback.format_exc(limit=-6)
    # Whatever else a check lets through is a broken promise too.
    except BaseException:
        return traceback.format_exc(limit=-12)
    return ""
