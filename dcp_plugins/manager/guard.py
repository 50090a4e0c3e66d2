"""Keeping a checkpoint from being deleted while it is read, between the processes of one machine.

A reader holds a shared lock (``flock``) on the checkpoint's directory; who wants to delete needs an exclusive one, and
leaves the checkpoint for the next time if there are readers. A killed process holds no lock. Where the file system has
no such locks, or they do not reach other machines (many network file systems), nothing is promised beyond what the
ranks of one job agree on.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dcp_plugins.manager.directory import delete_checkpoint, is_committed

__all__ = ["delete_unless_read", "reading_checkpoint"]

_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextmanager
def reading_checkpoint(path: str | os.PathLike[str]) -> Iterator[bool]:
    """Keep managers on this machine from deleting a checkpoint.

    Yields:
        Whether it is there: False if it is not committed, or is being deleted.
    """
    fd = _open(path)
    if fd is None:
        yield False
        return
    try:
        # Looked at under the lock: who deletes takes the commit away under his.
        yield _lock(fd, fcntl.LOCK_SH) and is_committed(path)
    finally:
        # A process that was forked in the meantime has the lock, too, by a descriptor of its own.
        _lock(fd, fcntl.LOCK_UN)
        os.close(fd)


def delete_unless_read(path: str | os.PathLike[str]) -> bool:
    """Delete a checkpoint as `delete_checkpoint` does, unless it is being read; return whether it is gone."""
    if Path(path).is_symlink():
        # Its target is somebody else's.
        delete_checkpoint(path)
        return True
    fd = _open(path)
    if fd is None:
        return True
    try:
        if not _lock(fd, fcntl.LOCK_EX):
            return False
        delete_checkpoint(path)
        return True
    finally:
        os.close(fd)


def _open(path: str | os.PathLike[str]) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _lock(fd: int, kind: int) -> bool:
    """Take a lock without waiting; False if somebody else's stands against it, True where there are no locks."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as exc:
        return exc.errno not in _BUSY
    return True
