"""Local directories: writing into files, and their durable publication."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dcp_plugins import progress

__all__ = [
    "is_local_path",
    "make_directory",
    "naming",
    "publish",
    "remove_files",
    "sync_directory",
    "sync_file",
    "write_all",
    "write_new",
]

logger = logging.getLogger(__name__)


def is_local_path(checkpoint_id: str | os.PathLike[str]) -> bool:
    """Whether an id is a path and not a URL, which has a scheme.

    The function does not ask the file system. A save that cannot make or write the directory fails with an error that
    names the directory and the reason.
    """
    return "://" not in os.fspath(checkpoint_id)


def write_all(fd: int, buffers: list[memoryview | bytes], nbytes: int) -> None:
    """Write all buffers, in order, at the file's position; ``nbytes`` is their total length."""
    written = os.writev(fd, buffers)
    while written < nbytes:
        # A signal or a limit of the file system may cut a write short: go on behind what was taken.
        nbytes -= written
        while written >= len(first := memoryview(buffers[0]).cast("B")):
            written -= len(first)
            del buffers[0]
        buffers[0] = first[written:]
        written = os.writev(fd, buffers)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to an ``OSError`` that has none, such as the error of a write to a descriptor."""
    try:
        yield
    except OSError as exc:
        if exc.filename is None:
            exc.filename = str(path)
        raise


def make_directory(path: Path, *, sync: bool) -> None:
    """Create a directory and its parents; with ``sync``, so that they survive a loss of power.

    A directory that is there and empty was perhaps made by the caller a moment ago: its name is synced, too.
    """
    missing = []
    parent = path
    while not parent.is_dir():
        missing.append(parent)
        parent = parent.parent
    path.mkdir(parents=True, exist_ok=True)
    if sync:
        for new in missing or ([path] if _is_empty(path) else []):
            sync_directory(new.parent)


def _is_empty(path: Path) -> bool:
    with os.scandir(path) as entries:
        return next(entries, None) is None


def sync_file(fd: int) -> None:
    """Make a file's bytes durable. If the progress of this process is watched, each range of a large file is a step."""
    if progress.is_shown() and _sync_file_range is not None:
        for start in range(0, os.fstat(fd).st_size, _RANGE_BYTES):
            # Without this the device would have nothing to do between two ranges.
            _sync_range(_sync_file_range, fd, start + _RANGE_BYTES, _START_WRITING)
            _sync_range(_sync_file_range, fd, start, _WRITE_AND_WAIT)
            progress.step()
    os.fsync(fd)
    progress.step()


_RANGE_BYTES = 64 * 1024 * 1024
# Flags of the system call sync_file_range, which Python does not have.
_START_WRITING, _WRITE_AND_WAIT = 2, 1 | 2 | 4
_sync_file_range = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
# The file system does not have the call.
_NO_RANGES = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ESPIPE)


def _sync_range(call: Callable[..., int], fd: int, start: int, flags: int) -> None:
    if call(fd, ctypes.c_int64(start), ctypes.c_int64(_RANGE_BYTES), flags) == 0:
        return
    number = ctypes.get_errno()
    if number not in _NO_RANGES:
        # The kernel tells of a lost write once: fsync would not hear of it again.
        raise OSError(number, os.strerror(number))


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable (a file's own fsync does not cover its name)."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_new(path: Path, content: bytes, *, sync: bool) -> None:
    """Write a new file, in the place of what stands under its name.

    A link that stands there is deleted and not followed: it may lead to a file of somebody else.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        fd = os.open(path, flags, 0o666)
    except FileExistsError:
        path.unlink()
        fd = os.open(path, flags, 0o666)
    try:
        write_all(fd, [content], len(content))
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def publish(
    path: Path,
    content: bytes,
    temporary: Path,
    *,
    sync: bool,
    first: Callable[[], None] | None = None,
    confirm: Callable[[], None] | None = None,
) -> bool:
    """Give ``path`` the content in one atomic step: a reader sees the old file or the new one, never a part.

    Nothing raises after that step: what it publishes is there. Where the directory cannot be synced then, a warning is
    logged.

    Args:
        path: The final name; replaced if it exists.
        temporary: A name in the same directory that nobody else uses; gone afterwards, on failure too. What stands
            there, such as the rest of a killed call, is deleted.
        sync: Sync the content before the rename, and the directory before and after: everything that was written
            into the directory earlier is durable when the new name appears.
        first: Called when the content is written under its temporary name, before the rename.
        confirm: Called right before the rename, which does not take place if it raises.

    Returns:
        Whether the new name survives a loss of power, as far as was asked for. If not, keep what it replaces.
    """
    try:
        with naming(path):
            write_new(temporary, content, sync=sync)
        if first is not None:
            first()
        if sync:
            sync_directory(path.parent)
        if confirm is not None:
            confirm()
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # The caller needs the first error.
            temporary.unlink(missing_ok=True)
        raise
    if sync:
        try:
            sync_directory(path.parent)
        except OSError:
            logger.warning("%s is complete, but a loss of power now might undo its last step", path, exc_info=True)
            return False
    return True


def remove_files(path: Path, names: Iterable[str]) -> None:
    """Delete files; one that is gone already is no error, and after any other error the rest is deleted all the same.

    Raises:
        OSError: The first error.
    """
    failure: OSError | None = None
    for name in names:
        try:
            (path / name).unlink(missing_ok=True)
        except OSError as exc:
            failure = failure or exc
    if failure is not None:
        raise failure
