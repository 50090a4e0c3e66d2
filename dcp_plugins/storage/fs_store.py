"""A store over a torch ``FileSystemBase``, which a subclass of the writer or the reader has as ``fs``.

The file system needs the methods that torch calls: ``create_stream`` ("wb" and "rb", the latter seekable),
``concat_path``, ``init_path``, ``mkdir``, ``exists``, ``rename``, ``rm_file``. ``ls`` is optional.
"""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dcp_plugins import progress
from dcp_plugins.contract import FileSystemBase, StorageInfo
from dcp_plugins.errors import CorruptCheckpointError, StorageWriteError
from dcp_plugins.format.data_mark import mark
from dcp_plugins.format.names import check_relative, new_save_id, temporary_name
from dcp_plugins.storage.arrays import OpenFile
from dcp_plugins.storage.file_system import FileSystem
from dcp_plugins.storage.store import LocalStore, NewFile, Store

__all__ = ["FsStore", "store_of"]

logger = logging.getLogger(__name__)

# Smaller buffers are joined: a stream may send each write as a request of its own.
_JOINED_BYTES = 64 * 1024


def store_of(fs: FileSystemBase, path: str | os.PathLike[str]) -> Store:
    """Return the store of a checkpoint at ``path``, which ``fs.init_path`` has returned."""
    # Only the class itself is known to be the local disk: a subclass may have another `create_stream`.
    return LocalStore(Path(path)) if type(fs) is FileSystem else FsStore(fs, path)


class FsStore:
    """The files of a checkpoint on a ``FileSystemBase``."""

    # Torch calls a file system from one thread by default, so user's classes need not be safe for threads.
    serves_threads = False

    def __init__(self, fs: FileSystemBase, path: str | os.PathLike[str]) -> None:
        self._fs: Any = fs
        self._path = path
        self.can_list = callable(getattr(fs, "ls", None))

    def _at(self, name: str) -> Any:
        return self._fs.concat_path(self._path, check_relative(name))

    def make(self, *, sync: bool) -> None:
        self._fs.mkdir(self._path)

    def exists(self, name: str) -> bool:
        return bool(self._fs.exists(self._at(name)))

    def names(self, folder: str = "") -> list[str]:
        path = self._at(folder) if folder else self._path
        return [str(entry).rstrip("/").rpartition("/")[2] for entry in self._fs.ls(path)]

    def read(self, name: str) -> bytes:
        self._expect(name)
        with self._fs.create_stream(self._at(name), "rb") as stream:
            return bytes(stream.read())

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[OpenFile, int]]:
        self._expect(name)
        with self._fs.create_stream(self._at(name), "rb") as stream:
            stream.seek(0, os.SEEK_END)
            yield _StreamReader(stream), stream.tell()

    @contextmanager
    def create(self, name: str) -> Iterator[NewFile]:
        with self._fs.create_stream(self._at(name), "wb") as stream:
            yield _StreamWriter(stream)
        # Torch's writer closes the stream too, and some file systems rely on that.
        stream.close()

    def _expect(self, name: str) -> None:
        # File systems raise different errors for a missing file: make them one.
        if not self.exists(name):
            raise FileNotFoundError(f"{self._at(name)} does not exist")

    def publish(
        self, name: str, content: bytes, temporary: str, *, sync: bool, confirm: Callable[[], None] | None
    ) -> bool:
        """Write the content under a temporary name, and rename that.

        Where the rename replaces the old file in one step, either content is there at every instant. Where it refuses
        to replace, the old file is put aside first: a kill between the two renames leaves it under a temporary name.
        """
        try:
            with self.create(temporary) as file:
                file.write_all([content], len(content))
                if sync:
                    file.sync()
            if confirm is not None:
                confirm()
            if not self._renamed(temporary, name):
                self._replace(name, temporary)
        except BaseException:
            self._discard(temporary)
            raise
        return True

    def _discard(self, temporary: str) -> None:
        try:
            self.remove([temporary])
        # The caller needs the error that made the save fail, not this one.
        except Exception:
            logger.warning("could not delete %s", self._at(temporary), exc_info=True)

    def _renamed(self, source: str, target: str) -> bool:
        """Rename a file; False if the file system refused or did nothing, because the target exists."""
        try:
            self._fs.rename(self._at(source), self._at(target))
        # File systems raise different errors for a name that exists.
        except Exception:
            if not (self.exists(source) and self.exists(target)):
                raise
            return False
        return not self.exists(source)

    def _replace(self, name: str, temporary: str) -> None:
        aside = temporary_name(name, new_save_id())
        if not (self.exists(name) and self._renamed(name, aside)):
            raise StorageWriteError(f"{self._at(temporary)} could not be renamed to {self._at(name)}")
        try:
            if not self._renamed(temporary, name):
                raise StorageWriteError(f"{self._at(temporary)} could not be renamed to {self._at(name)}")
        except BaseException:
            self._fs.rename(self._at(aside), self._at(name))
            raise
        self.remove([aside])

    def sizes(self, names: Collection[str], infos: Iterable[StorageInfo]) -> dict[str, int]:
        # The mark follows a file's last item. Asking the file system would take a request for each file.
        ends = dict.fromkeys(sorted(names), 0)
        for info in infos:
            ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
        return {name: end + len(mark(name)) for name, end in ends.items()}

    def remove(self, names: Iterable[str], *, sync: bool = False) -> None:
        for name in names:
            if self.exists(name):
                self._fs.rm_file(self._at(name))


class _StreamWriter:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write_all(self, buffers: list[Any], nbytes: int) -> None:
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        small: list[memoryview] = []
        for view in views:
            if len(view) < _JOINED_BYTES:
                small.append(view)
                continue
            self._write(b"".join(small))
            small = []
            self._write(view)
        self._write(b"".join(small))

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            written = self._stream.write(view)
            progress.step()
            # A raw stream may write a part. A stream that returns None has written everything.
            view = view[len(view) if written is None else written :]

    def sync(self) -> None:
        self._stream.flush()
        try:
            fd = self._stream.fileno()
        except (AttributeError, io.UnsupportedOperation):
            return  # A stream without a descriptor cannot be synced; its close has to store the bytes.
        os.fsync(fd)


class _StreamReader:
    """Positioned reads from a stream, for any number of threads."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def read_into(self, buffers: list[Any], position: int, nbytes: int, where: str) -> None:
        with self._lock:
            self._stream.seek(position)
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                while len(view):
                    content = self._stream.read(len(view))
                    if not content:
                        raise CorruptCheckpointError(f"{where}: the file ends too early: it was truncated")
                    view[: len(content)] = content
                    view = view[len(content) :]
