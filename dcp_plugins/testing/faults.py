"""Fault injection for code that writes files: fail, tear or kill the process at a chosen file-system step.

A *step* is one of the system calls that change a directory: ``open`` (for writing), ``writev``, ``fsync`` (of a file),
``dirsync`` (``fsync`` of a directory), ``rename``, ``unlink``, ``mkdir``. Steps are counted per operation, or all
together, only below one directory, and only while the injection is active, so that a test can first record the steps
of a save and then fail each of them in turn::

    with record_steps(folder) as steps:
        dcp.save(state, checkpoint_id=folder)
    for nth in range(len(steps)):
        run_ranks(1, save_under_fault, folder, Fault(nth=nth), expect_deaths=True)

What is patched are the functions of ``os``: writers in other languages, or through other functions of ``os``, are not
seen. Not for use in production.
"""

from __future__ import annotations

import errno
import os
import pathlib
import signal
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = ["FAULTS_VARIABLE", "Action", "Fault", "Operation", "inject", "inject_from_environment", "record_steps"]

Operation = Literal["open", "writev", "fsync", "dirsync", "rename", "unlink", "mkdir"]
Action = Literal["raise", "kill", "tear"]

FAULTS_VARIABLE = "DCP_PLUGINS_FAULT"
"""Environment variable that ``inject_from_environment`` reads."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and when.

    Attributes:
        operation: Which steps are counted; None counts all of them together.
        nth: The step that fails, the first being 0.
        action: ``raise`` an ``OSError``; ``kill`` this process with SIGKILL before the step; ``tear`` a ``writev``,
            which writes half of its bytes, and then kill (any other step is torn by killing after it).
        error: ``errno`` of the error that is raised.
        lasting: Whether every later step of the kind fails too, as on a full disk.
    """

    operation: Operation | None = None
    nth: int = 0
    action: Action = "raise"
    error: int = errno.ENOSPC
    lasting: bool = False

    def __post_init__(self) -> None:
        if self.operation is not None and self.operation not in get_args(Operation):
            raise ValueError(f"operation must be one of {', '.join(get_args(Operation))} or None: {self.operation!r}")
        if self.action not in get_args(Action):
            raise ValueError(f"action must be one of {', '.join(get_args(Action))}, got {self.action!r}")
        if self.nth < 0:
            raise ValueError(f"nth must not be negative, got {self.nth}")

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Return the fault that ``operation:nth:action`` spells; ``any`` stands for every operation.

        Raises:
            ValueError: It is spelt otherwise.
        """
        parts = text.split(":")
        if len(parts) != 3 or not parts[1].isdigit():
            raise ValueError(f"expected operation:nth:action, such as 'writev:3:kill' or 'any:0:raise', got {text!r}")
        operation: Any = None if parts[0] == "any" else parts[0]
        action: Any = parts[2]
        return cls(operation, int(parts[1]), action)


@contextmanager
def inject(fault: Fault | None, under: str | os.PathLike[str]) -> Iterator[list[str]]:
    """Let ``fault`` happen to what this process does below a directory, in any of its threads.

    Args:
        fault: What goes wrong; None only records.
        under: The directory; it need not exist yet.

    Yields:
        The steps so far, each as its operation and file name (``"writev __0_0-....distcp"``), the failed one included.
    """
    with _patched(_Injection(fault, os.path.realpath(under))) as injection:
        yield injection.steps


@contextmanager
def record_steps(under: str | os.PathLike[str]) -> Iterator[list[str]]:
    """Record the steps below a directory, as ``inject`` does, without failing any."""
    with inject(None, under) as steps:
        yield steps


@contextmanager
def inject_from_environment(under: str | os.PathLike[str]) -> Iterator[list[str]]:
    """Do as ``inject`` with the fault that ``DCP_PLUGINS_FAULT`` spells (see ``Fault.parse``), if it is set."""
    text = os.environ.get(FAULTS_VARIABLE)
    with inject(Fault.parse(text) if text else None, under) as steps:
        yield steps


class _Injection:
    """Counts steps and makes one of them fail."""

    def __init__(self, fault: Fault | None, root: str) -> None:
        self._fault = fault
        self._root = root
        self._seen = 0
        self._lock = threading.Lock()
        self._paths: dict[int, str] = {}
        self.real = {name: getattr(os, name) for name in _REPLACEMENTS}
        self.steps: list[str] = []

    def inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return False
        parent, name = os.path.split(os.fsdecode(path))
        full = os.path.join(os.path.realpath(parent), name)
        return full == self._root or full.startswith(os.path.join(self._root, ""))

    def opened(self, fd: int, path: Any) -> None:
        self._paths[fd] = os.fsdecode(path)

    def closed(self, fd: int) -> None:
        self._paths.pop(fd, None)

    def path_of(self, fd: int) -> str | None:
        return self._paths.get(fd)

    def step(self, operation: Operation, path: Any, tear: Callable[[], object]) -> None:
        """Count one step, and let it fail if it is its turn.

        Args:
            tear: Does a part of the step, or all of it, for a process that dies in its midst.
        """
        fault = self._fault
        with self._lock:
            self.steps.append(f"{operation} {os.path.basename(os.fsdecode(path))}")
            if fault is None or fault.operation not in (None, operation):
                return
            seen, self._seen = self._seen, self._seen + 1
        if seen != fault.nth and not (fault.lasting and seen > fault.nth):
            return
        if fault.action == "raise":
            raise OSError(fault.error, f"injected: {os.strerror(fault.error)}", os.fsdecode(path))
        if fault.action == "tear":
            tear()
        os.kill(os.getpid(), signal.SIGKILL)


def _open(injection: _Injection, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
    call = injection.real["open"]
    if not injection.inside(path):
        return int(call(path, flags, *args, **kwargs))
    if flags & _WRITING:
        injection.step("open", path, lambda: call(path, flags, *args, **kwargs))
    fd = int(call(path, flags, *args, **kwargs))
    injection.opened(fd, path)
    return fd


def _close(injection: _Injection, fd: int) -> None:
    injection.closed(fd)
    injection.real["close"](fd)


def _writev(injection: _Injection, fd: int, buffers: Sequence[Any]) -> int:
    path = injection.path_of(fd)
    if path is not None:
        injection.step("writev", path, lambda: _write_half(injection.real["writev"], fd, buffers))
    return int(injection.real["writev"](fd, buffers))


def _write_half(call: Callable[[int, list[Any]], int], fd: int, buffers: Sequence[Any]) -> None:
    views = [memoryview(buffer).cast("B") for buffer in buffers if memoryview(buffer).nbytes]
    left = sum(map(len, views)) // 2
    half = []
    for view in views:
        half.append(view[:left])
        left -= len(half[-1])
    call(fd, half)


def _fsync(injection: _Injection, fd: int) -> None:
    path = injection.path_of(fd)
    if path is not None:
        kind: Operation = "dirsync" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync"
        injection.step(kind, path, lambda: injection.real["fsync"](fd))
    injection.real["fsync"](fd)


def _on_path(name: str, operation: Operation) -> Callable[..., Any]:
    def replacement(injection: _Injection, path: Any, *args: Any, **kwargs: Any) -> Any:
        call = injection.real[name]
        if injection.inside(path):
            injection.step(operation, path, lambda: call(path, *args, **kwargs))
        return call(path, *args, **kwargs)

    return replacement


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "open": _open,
    "close": _close,
    "writev": _writev,
    "fsync": _fsync,
    "mkdir": _on_path("mkdir", "mkdir"),
    "rename": _on_path("rename", "rename"),
    "replace": _on_path("replace", "rename"),
    "unlink": _on_path("unlink", "unlink"),
    "remove": _on_path("remove", "unlink"),
}
_active = threading.Lock()


@contextmanager
def _patched(injection: _Injection) -> Iterator[_Injection]:
    if not _active.acquire(blocking=False):
        raise RuntimeError("another injection is active in this process: end it first")
    # Until Python 3.10, pathlib keeps references of its own to the functions of os.
    accessor = getattr(pathlib, "_NormalAccessor", None)
    places = [(os, name) for name in _REPLACEMENTS]
    places += [(accessor, name) for name in _REPLACEMENTS if accessor is not None and hasattr(accessor, name)]
    saved = [(place, name, vars(place)[name]) for place, name in places]
    try:
        for place, name in places:
            bound = _bind(_REPLACEMENTS[name], injection)
            setattr(place, name, bound if place is os else staticmethod(bound))
        yield injection
    finally:
        for place, name, value in saved:
            setattr(place, name, value)
        _active.release()


def _bind(function: Callable[..., Any], injection: _Injection) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return function(injection, *args, **kwargs)

    return replacement
