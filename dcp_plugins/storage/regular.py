"""Opening the files of a checkpoint for reading: regular files only, inside the checkpoint's directory.

A checkpoint from a stranger may hold other things under the names of its files. A read from a named pipe would wait for
ever, a read from a device would never end, and a link could lead to a file that the stranger must not see.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple

from dcp_plugins.errors import CorruptCheckpointError, UnsafeCheckpointError
from dcp_plugins.format.names import check_relative

__all__ = ["FileIdentity", "open_regular", "read_regular"]

# Without O_NONBLOCK, opening a pipe would wait for a writer. Of regular files, it concerns those with leases only.
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY
# The kernel's errors for a path with a link that must not be followed.
_IS_LINK = (errno.ELOOP, errno.ENOTDIR, errno.EMLINK)

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class FileIdentity(NamedTuple):
    """Identifies a file and its contents: a file that was replaced or written to has another identity."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """Return the identity of the file that ``fstat`` described."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def open_regular(root: str | os.PathLike[str], relative: str) -> tuple[int, os.stat_result]:
    """Open a file of a checkpoint for reading; return its descriptor and what ``fstat`` says of it.

    A link out of the checkpoint is refused, except into the ``blobs`` of the same Hugging Face cache entry, whose
    snapshots are made of such links. The kernel resolves the checked path, so that another process cannot put a link
    into the path after the check.

    Args:
        root: The checkpoint's directory, which may itself be reached through links.
        relative: The file's name in it, with ``/`` between its parts.

    Raises:
        FileNotFoundError: There is none.
        IsADirectoryError: It is a directory.
        UnsafeCheckpointError: The name or a link leads outside, or the file is a pipe, a device or a socket.
    """
    path = os.path.join(root, check_relative(relative))
    try:
        if "/" in relative:
            return _regular(_open_below(os.fspath(root), relative.split("/")), path)
        return _regular(_open_file(path, None), path)
    except OSError as exc:
        if exc.errno not in _IS_LINK:
            if exc.errno == errno.ENXIO:
                raise _not_regular(path, "a socket") from None
            exc.filename = path
            raise
        behind = _behind_links(Path(root), relative)
        if behind is None:
            if exc.errno == errno.ELOOP:
                raise _not_regular(path, "a link to itself") from None
            exc.filename = path
            raise
    try:
        return _regular(_open_below(*behind), path)
    except OSError as exc:
        exc.filename = path
        raise


def read_regular(root: str | os.PathLike[str], relative: str, *, max_bytes: int | None = None) -> bytes:
    """Return the contents of a file of a checkpoint.

    Raises:
        CorruptCheckpointError: It has more than ``max_bytes``, or more than there is memory for.
        OSError, UnsafeCheckpointError: As from `open_regular`.
    """
    fd, found = open_regular(root, relative)
    with open(fd, "rb") as stream:
        if max_bytes is not None and found.st_size > max_bytes:
            raise CorruptCheckpointError(
                f"{os.path.join(root, relative)} has {found.st_size} bytes, expected {max_bytes} at most"
            )
        try:
            return stream.read()
        except MemoryError as exc:
            raise CorruptCheckpointError(
                f"{os.path.join(root, relative)} has {found.st_size} bytes, more than there is memory for: no save "
                "writes such a file. Load another checkpoint"
            ) from exc


def _open_below(base: str, parts: list[str]) -> int:
    """Open a file without following any link below ``base``."""
    folder = os.open(base, _FOLDER)
    try:
        for part in parts[:-1]:
            below = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = below
        return _open_file(parts[-1], folder)
    finally:
        os.close(folder)


def _open_file(name: str, folder: int | None) -> int:
    try:
        return os.open(name, _FILE, dir_fd=folder)
    except BlockingIOError:
        # Another program, such as a file server, has a lease on the file, and needs time to give the lease back. A
        # regular file can be waited for. Opening the descriptor again opens the file that was checked.
        checked = os.open(name, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=folder)
        try:
            if not stat.S_ISREG(os.fstat(checked).st_mode):
                raise
            return os.open(f"/proc/self/fd/{checked}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(checked)


def _regular(fd: int, path: str) -> tuple[int, os.stat_result]:
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode):
        return fd, found
    os.close(fd)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "expected a file, found a directory", path)
    raise _not_regular(path, next((kind for test, kind in _KINDS if test(found.st_mode)), "of an unknown kind"))


def _not_regular(path: str, kind: str) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        f"{path} is {kind}, not a regular file. No save makes one: load another checkpoint, or copy this one from its "
        "source again"
    )


def _behind_links(root: Path, relative: str) -> tuple[str, list[str]] | None:
    """Return an allowed folder that the links lead into, and the parts of the file's path below it.

    Return None if there is no link in the path.
    """
    real_root = os.path.realpath(root)
    real = os.path.realpath(root / relative)
    if real == os.path.join(real_root, relative):
        return None
    for base in (real_root, _blobs(real_root)):
        if base is not None and real.startswith(os.path.join(base, "")):
            below = list(Path(real).relative_to(base).parts)
            # There are no folders among the blobs.
            if base == real_root or len(below) == 1:
                return base, below
    raise UnsafeCheckpointError(
        f"file {relative!r} of the checkpoint in {root} is reached through a symbolic link to {real}, outside the "
        "checkpoint's directory; if you trust it, copy the checkpoint with links followed (cp -rL) and load the copy"
    )


def _blobs(real_root: str) -> str | None:
    """Return the folder of the blobs in the cache entry of which ``real_root`` is (part of) a snapshot."""
    parts = Path(real_root).parts
    if "snapshots" not in parts:
        return None
    last = len(parts) - 1 - parts[::-1].index("snapshots")
    return os.path.join(*parts[:last], "blobs") if last > 0 else None
