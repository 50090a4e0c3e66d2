"""A bounded number of open files, for all threads of a read: a checkpoint may have more than a process may open."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["OpenFiles"]

F = TypeVar("F")

# Usual limits are 1,024 descriptors for a process, which has others of its own.
_MAX_OPEN = 256


class _Entry(Generic[F]):
    """An open file; a context manager, of any number of users at a time, that gives it."""

    __slots__ = ("_lock", "file", "manager", "num_users")

    def __init__(self, manager: AbstractContextManager[F], lock: threading.Lock) -> None:
        self.manager = manager
        self.file = manager.__enter__()
        self.num_users = 0
        self._lock = lock

    def __enter__(self) -> F:
        return self.file

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self.num_users -= 1


class OpenFiles(Generic[F]):
    """Opens files by name where they are read, and keeps the ones used last open. A context manager that closes all.

    A file that stays open is the one that was looked at, whatever a save beside the read puts under its name.

    Args:
        open_file: Opens the file of a name, as a context manager.
        max_open: How many files stay open; those that are being read come on top.
    """

    def __init__(self, open_file: Callable[[str], AbstractContextManager[F]], max_open: int = _MAX_OPEN) -> None:
        self._open_file = open_file
        self._max_open = max_open
        # The one used last comes last.
        self._entries: dict[str, _Entry[F]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> OpenFiles[F]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            while self._close_one():
                pass

    def opened(self, name: str) -> AbstractContextManager[F]:
        """Return what gives the file of a name, open until the end of the ``with`` at least; to be used once."""
        with self._lock:
            entry = self._entries.pop(name, None) or self._open(name)
            self._entries[name] = entry
            entry.num_users += 1
        return entry

    def _open(self, name: str) -> _Entry[F]:
        while len(self._entries) >= self._max_open and self._close_one():
            pass
        while True:
            try:
                return _Entry(self._open_file(name), self._lock)
            except OSError as exc:
                # The process has used up its descriptors, or the machine has.
                if exc.errno not in (errno.EMFILE, errno.ENFILE) or not self._close_one():
                    raise

    def _close_one(self) -> bool:
        """Close the file that was used longest ago and is not being read; False if there is none."""
        name = next((name for name, entry in self._entries.items() if not entry.num_users), None)
        if name is None:
            return False
        self._entries.pop(name).manager.__exit__(None, None, None)
        return True
