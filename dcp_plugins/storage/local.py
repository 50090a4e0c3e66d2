"""Local directories: durable publication of a file, and the litter that killed saves leave."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dcp_plugins.format.names import is_stock_data_name, is_stock_temporary_name, is_temporary_name, save_id_of

__all__ = [
    "is_local_path",
    "litter",
    "litter_among",
    "make_directory",
    "naming",
    "publish",
    "remove_files",
    "sync_directory",
    "write_all",
]


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
    """Create a directory and its parents; with ``sync``, so that they survive a loss of power."""
    missing = []
    parent = path
    while not parent.is_dir():
        missing.append(parent)
        parent = parent.parent
    path.mkdir(parents=True, exist_ok=True)
    if sync:
        for made in missing:
            sync_directory(made.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable (a file's own fsync does not cover its name)."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(path: Path, content: bytes, temporary: Path, *, sync: bool) -> None:
    """Give ``path`` the content in one atomic step: a reader sees the old file or the new one, never a part.

    Args:
        path: The final name; replaced if it exists.
        temporary: A name in the same directory that nobody else uses; gone afterwards, on failure too.
        sync: Sync the content before the rename, and the directory before and after: everything that was written
            into the directory earlier is durable when the new name appears.
    """
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            with naming(path):
                write_all(fd, [content], len(content))
                if sync:
                    os.fsync(fd)
        finally:
            os.close(fd)
        if sync:
            sync_directory(path.parent)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_directory(path.parent)


def litter(path: Path, referenced: Collection[str]) -> list[str]:
    """Return the names in a checkpoint's directory that only a save, ours or torch's, can have made and nobody needs.

    Args:
        path: The directory.
        referenced: Names that committed metadata refers to.
    """
    return litter_among(os.listdir(path), referenced)


def litter_among(names: Iterable[str], referenced: Collection[str]) -> list[str]:
    """Return the litter among the names of a directory, see ``litter``."""
    return sorted(
        name
        for name in names
        if name not in referenced
        and (
            save_id_of(name) is not None
            or is_temporary_name(name)
            or is_stock_data_name(name)
            or is_stock_temporary_name(name)
        )
    )


def remove_files(path: Path, names: Iterable[str]) -> None:
    """Delete files; one that is gone already is no error."""
    for name in names:
        (path / name).unlink(missing_ok=True)
