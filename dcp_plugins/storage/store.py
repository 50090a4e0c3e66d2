"""Stores: where the files of a checkpoint live. A store knows names in a directory, and bytes.

The store of local directories gives out file descriptors, so that nothing is copied. ``fs_store`` has the store of
other file systems.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from dcp_plugins.contract import StorageInfo
from dcp_plugins.format.metadata import decode
from dcp_plugins.storage.arrays import OpenFile
from dcp_plugins.storage.local import (
    make_directory,
    naming,
    publish,
    remove_files,
    sync_directory,
    sync_file,
    write_all,
)
from dcp_plugins.storage.regular import open_regular, read_regular

__all__ = ["LocalStore", "NewFile", "Store", "files_named_by"]


class NewFile(Protocol):
    """A file that is being written, by one thread, from its start to its end."""

    def write_all(self, buffers: list[Any], nbytes: int) -> None:
        """Append all buffers, ``nbytes`` in total; their memory may change afterwards."""

    def sync(self) -> None:
        """Make the written bytes survive a loss of power, as far as this kind of file can."""


class Store(Protocol):
    """The files of one checkpoint. A name may have ``/`` in it; a store checks that a name stays in the checkpoint."""

    serves_threads: bool
    """Whether several threads may use it at once."""
    can_list: bool
    """Whether ``names`` works."""

    def make(self, *, sync: bool) -> None:
        """Make the directory, unless it exists."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

    def names(self, folder: str = "") -> list[str]:
        """List the files of the directory, or of a folder in it, if this store can list."""

    def read(self, name: str) -> bytes:
        """Return a whole file.

        Raises:
            FileNotFoundError: There is none.
        """

    def open(self, name: str) -> AbstractContextManager[tuple[OpenFile, int]]:
        """Open a file for positioned reads, and tell its size in bytes.

        Raises:
            FileNotFoundError: There is none.
            UnsafeCheckpointError: The name leads out of the checkpoint, or to what is no file.
        """

    def create(self, name: str) -> AbstractContextManager[NewFile]:
        """Open a new file for writing."""

    def publish(
        self, name: str, content: bytes, temporary: str, *, sync: bool, confirm: Callable[[], None] | None
    ) -> bool:
        """Write a file under a temporary name and rename it, in one step as far as this store can.

        Nothing raises after that step. If it returns False, keep what the file replaces: a loss of power might undo it.
        ``confirm`` is called right before that step, which does not take place if it raises.
        """

    def sizes(self, names: Collection[str], infos: Iterable[StorageInfo]) -> dict[str, int]:
        """Return the size of each file in bytes; ``infos`` describe the items that were written into the files."""

    def remove(self, names: Iterable[str], *, sync: bool = False) -> None:
        """Delete files; a file that does not exist is no error."""


class _LocalFile:
    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path

    def write_all(self, buffers: list[Any], nbytes: int) -> None:
        with naming(self._path):
            write_all(self._fd, buffers, nbytes)

    def sync(self) -> None:
        with naming(self._path):
            sync_file(self._fd)


class LocalStore:
    """A local directory."""

    serves_threads = True
    can_list = True

    def __init__(self, path: Path) -> None:
        self._path = path

    def make(self, *, sync: bool) -> None:
        make_directory(self._path, sync=sync)

    def exists(self, name: str) -> bool:
        return (self._path / name).exists()

    def names(self, folder: str = "") -> list[str]:
        try:
            return os.listdir(self._path / folder)
        except FileNotFoundError:
            if not folder:
                raise
            return []

    def read(self, name: str) -> bytes:
        return read_regular(self._path, name)

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[OpenFile, int]]:
        fd, found = open_regular(self._path, name)
        try:
            yield fd, found.st_size
        finally:
            os.close(fd)

    @contextmanager
    def create(self, name: str) -> Iterator[NewFile]:
        # O_EXCL: names are unique to the save, so a file of this name would be a bug.
        path = self._path / name
        with self._naming_deletion():
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            yield _LocalFile(fd, path)
        finally:
            os.close(fd)

    def publish(
        self, name: str, content: bytes, temporary: str, *, sync: bool, confirm: Callable[[], None] | None
    ) -> bool:
        with self._naming_deletion():
            return publish(self._path / name, content, self._path / temporary, sync=sync, confirm=confirm)

    def sizes(self, names: Collection[str], infos: Iterable[StorageInfo]) -> dict[str, int]:
        # Ask the files: a file of another rank may not be visible on this machine, which must not stay unnoticed.
        with self._naming_deletion():
            return {name: (self._path / name).stat().st_size for name in sorted(names)}

    @contextmanager
    def _naming_deletion(self) -> Iterator[None]:
        """Name the probable cause if a file or the directory is missing in the middle of a save."""
        try:
            yield
        except FileNotFoundError as exc:
            is_there = self._path.is_dir()
            gone = os.fspath(exc.filename) if is_there else os.fspath(self._path)
            cause = (
                "it was deleted before the save was committed. Let a rotation of old checkpoints spare the one that is"
                " being saved"
            )
            if is_there:
                cause += ". Or another rank wrote it on another machine, and the machines do not share this directory"
            raise FileNotFoundError(errno.ENOENT, cause, gone) from exc

    def remove(self, names: Iterable[str], *, sync: bool = False) -> None:
        remove_files(self._path, names)
        if sync:
            sync_directory(self._path)


def files_named_by(store: Store, name: str) -> set[str]:
    """Return the data files that the metadata file ``name`` refers to; none if there is no such file."""
    if not store.exists(name):
        return set()
    named = decode(store.read(name), name).storage_data or {}
    return {info.relative_path for info in named.values() if isinstance(info, StorageInfo)}
