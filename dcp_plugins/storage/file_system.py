"""The verbs of a file system, on local paths: the object that torch's writers and readers keep as ``fs``.

Our own writer and reader do not go through it. It is here for code written against torch's, which subclasses it or
calls it to list, move and delete what a checkpoint is made of.
"""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from dcp_plugins.contract import FileSystemBase
from dcp_plugins.storage.local import is_local_path

__all__ = ["FileSystem"]


class FileSystem(FileSystemBase):
    """Local files; every path may be a string or path-like."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        """Open a file for the length of a ``with`` block."""
        with Path(path).open(mode) as stream:
            yield cast("io.IOBase", stream)

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str | os.PathLike[str]:
        return Path(path) / suffix

    def init_path(self, path: str | os.PathLike[str]) -> str | os.PathLike[str]:
        return Path(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Move a file; on POSIX in one step, in place of what is there."""
        Path(path).rename(new_path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Make a directory and its parents, unless it exists."""
        Path(path).mkdir(parents=True, exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return is_local_path(checkpoint_id)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return Path(path).exists()

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        Path(path).unlink()

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        """List a directory; the paths start with ``path``."""
        return [str(entry) for entry in Path(path).iterdir()]
