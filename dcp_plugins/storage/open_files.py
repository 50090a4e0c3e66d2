"""A bounded number of open files, for all threads of a read: a checkpoint may have more than a process may open."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["OpenFiles"]

F = TypeVar("F")

# Usual limits are 1,024 descriptors for a process, which has others of its own.
_MAX_OPEN = 256


@dataclass
class _Entry(Generic[F]):
    """An open file."""

    manager: AbstractContextManager[F]
    file: F
    num_users: int


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

    @contextmanager
    def opened(self, name: str) -> Iterator[F]:
        """Give the file of a name, open until the end of the ``with`` at least."""
        with self._lock:
            entry = self._entries.pop(name, None) or self._open(name)
            self._entries[name] = entry
            entry.num_users += 1
        try:
            yield entry.file
        finally:
            with self._lock:
                entry.num_users -= 1

    def _open(self, name: str) -> _Entry[F]:
        while len(self._entries) >= self._max_open and self._close_one():
            pass
        while True:
            manager = self._open_file(name)
            try:
                return _Entry(manager, manager.__enter__(), 0)
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
