"""A cache of open files for the threads of a read: a checkpoint may have more files than a process may open."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["MAX_OPEN", "OpenFiles"]

F = TypeVar("F")

MAX_OPEN = 256
"""A process may usually open 1,024 files, and needs descriptors for other purposes, too."""


class _Entry(Generic[F]):
    """An open file, and how many threads use it. A context manager that several threads may enter at a time."""

    __slots__ = ("_owner", "file", "manager", "num_users")

    def __init__(self, manager: AbstractContextManager[F], owner: OpenFiles[F]) -> None:
        self.manager = manager
        self.file = manager.__enter__()
        self.num_users = 0
        self._owner = owner

    def __enter__(self) -> F:
        return self.file

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner._release(self)


class OpenFiles(Generic[F]):
    """Opens files by name, and keeps those used last open. A context manager that closes all files at its end.

    Args:
        open_file: Opens the file of a name, as a context manager.
        max_open: How many files stay open while no thread uses them.
    """

    def __init__(self, open_file: Callable[[str], AbstractContextManager[F]], max_open: int = MAX_OPEN) -> None:
        self._open_file = open_file
        self._max_open = max_open
        # In the order of their last use.
        self._entries: dict[str, _Entry[F]] = {}
        self._lock = threading.Lock()
        self._released = threading.Condition(self._lock)
        self._num_waiting = 0
        self._this_thread = threading.local()

    def __enter__(self) -> OpenFiles[F]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            while self._close_one():
                pass

    def opened(self, name: str) -> AbstractContextManager[F]:
        """Return a context manager for one ``with`` statement: the file stays open at least until its end."""
        with self._lock:
            while (entry := self._entries.pop(name, None) or self._open(name)) is None:
                self._num_waiting += 1
                self._released.wait()
                self._num_waiting -= 1
            self._entries[name] = entry
            entry.num_users += 1
            self._this_thread.num_used = self._num_used_here() + 1
        return entry

    def _num_used_here(self) -> int:
        return getattr(self._this_thread, "num_used", 0)

    def _release(self, entry: _Entry[F]) -> None:
        with self._lock:
            entry.num_users -= 1
            self._this_thread.num_used -= 1
            if self._num_waiting:
                self._released.notify_all()

    def _open(self, name: str) -> _Entry[F] | None:
        """Open a file; return None if another thread must first release the descriptor of a file."""
        while len(self._entries) >= self._max_open and self._close_one():
            pass
        while True:
            try:
                return _Entry(self._open_file(name), self)
            except OSError as exc:
                # The process has used up its descriptors, or the machine has.
                if exc.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                if not self._close_one():
                    # If a thread that uses a file waited for another thread, both could wait for each other.
                    if self._num_used_here() or not self._entries:
                        raise
                    return None

    def _close_one(self) -> bool:
        """Close the unused file whose last use is the longest ago; return False if there is none."""
        name = next((name for name, entry in self._entries.items() if not entry.num_users), None)
        if name is None:
            return False
        self._entries.pop(name).manager.__exit__(None, None, None)
        return True
