"""File systems of a user's own, for the tests of ``fs``: each is written against torch's interface alone."""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.filesystem import FileSystemBase

import dcp_plugins as dcp


class _MemoryFile(io.BytesIO):
    """Is in the dict once it is closed, which torch's writer does itself."""

    def __init__(self, files: dict[str, bytes], path: str) -> None:
        super().__init__()
        self._files = files
        self._path = path

    def close(self) -> None:
        if not self.closed:
            self._files[self._path] = self.getvalue()
        super().close()


class MemoryFs(FileSystemBase):
    """Files in a dict, under names such as ``memory://a/b``; has the verbs that torch asks for, and no other."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.calls: list[str] = []

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        self.calls.append(f"{mode} {path}")
        if mode == "rb":
            yield io.BytesIO(self.files[path])
            return
        stream = _MemoryFile(self.files, path)
        yield stream
        stream.close()

    def concat_path(self, path: Any, suffix: str) -> str:
        return f"{path}/{suffix}"

    def init_path(self, path: Any) -> str:
        assert str(path).startswith("memory:"), path
        return str(path)

    def rename(self, path: Any, new_path: Any) -> None:
        self.calls.append(f"rename {path}")
        self.files[new_path] = self.files.pop(path)

    def mkdir(self, path: Any) -> None:
        self.calls.append(f"mkdir {path}")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return str(checkpoint_id).startswith("memory://")

    def exists(self, path: Any) -> bool:
        return path in self.files

    def rm_file(self, path: Any) -> None:
        del self.files[path]


class ListedMemoryFs(MemoryFs):
    def ls(self, path: Any) -> list[str]:
        return [name for name in self.files if name.startswith(f"{path}/")]


class RefusingFs(MemoryFs):
    """Does not rename a file to a name that is taken."""

    def rename(self, path: Any, new_path: Any) -> None:
        if new_path in self.files:
            raise ValueError(f"{new_path} is taken")
        super().rename(path, new_path)


class IgnoringFs(MemoryFs):
    """Does nothing, and says nothing, when a file is renamed to a name that is taken."""

    def rename(self, path: Any, new_path: Any) -> None:
        if new_path not in self.files:
            super().rename(path, new_path)


class StreamsFs(FileSystemBase):
    """Local files, under a prefix of their own, so that nothing reaches them but through this."""

    prefix = "streams:"

    def local(self, path: Any) -> Path:
        assert str(path).startswith(self.prefix), path
        return Path(str(path).removeprefix(self.prefix))

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        with self.local(path).open(mode) as stream:
            yield stream  # type: ignore[misc]

    def concat_path(self, path: Any, suffix: str) -> str:
        return os.path.join(path, suffix)

    def init_path(self, path: Any) -> str:
        return str(path) if str(path).startswith(self.prefix) else f"{self.prefix}{path}"

    def rename(self, path: Any, new_path: Any) -> None:
        self.local(path).replace(self.local(new_path))

    def mkdir(self, path: Any) -> None:
        self.local(path).mkdir(parents=True, exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return str(checkpoint_id).startswith(cls.prefix)

    def exists(self, path: Any) -> bool:
        return self.local(path).exists()

    def rm_file(self, path: Any) -> None:
        self.local(path).unlink()

    def ls(self, path: Any) -> list[str]:
        return [f"{self.prefix}{entry}" for entry in self.local(path).iterdir()]


class StreamsWriter(dcp.FileSystemWriter):
    """As torch's fsspec writer is written: the file system and the path are set after the base class has begun."""

    def __init__(self, path: Any, **options: Any) -> None:
        super().__init__(path, **options)
        self.fs = StreamsFs()
        self.path = self.fs.init_path(path)  # type: ignore[assignment]


class StreamsReader(dcp.FileSystemReader):
    def __init__(self, path: Any, **options: Any) -> None:
        super().__init__(path, **options)
        self.fs = StreamsFs()
        self.path = self.fs.init_path(path)  # type: ignore[assignment]


class StockStreamsWriter(stock.FileSystemWriter):
    def __init__(self, path: Any) -> None:
        super().__init__(path)
        self.fs = StreamsFs()
        self.path = self.fs.init_path(path)


class StockStreamsReader(stock.FileSystemReader):
    def __init__(self, path: Any) -> None:
        super().__init__(path)
        self.fs = StreamsFs()
        self.path = self.fs.init_path(path)
