"""Checks of paths from Lightning's users: a string may be a URL, and a URL does not name a local directory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from dcp_plugins.errors import StorageDetectionError
from dcp_plugins.storage.local import is_local_path

__all__ = ["local_path", "refuse_urls"]

_PathLike = str | os.PathLike[str]
_FILE = "file://"


def local_path(path: _PathLike) -> Path:
    """Return the path of a local directory or file, which may be given as a ``file://`` URL.

    Raises:
        StorageDetectionError: ``path`` is a URL of another scheme. Without this check, ``Path`` would make a local name
            of the URL, and the checkpoint would be saved where nobody looks for it.
    """
    text = os.fspath(path)
    if is_local_path(text):
        return Path(path)
    if text.startswith(_FILE):
        return Path(text.removeprefix(_FILE))
    raise StorageDetectionError(
        f"Expected a path for a Lightning checkpoint, got the URL {text!r}. The strategies of dcp_plugins.lightning"
        " save to and load from directories of this machine, mounted ones included. Give a path; nothing has been"
        " read or written."
    )


def refuse_urls(folders: Iterable[_PathLike | None]) -> None:
    """Raise if one of the folders that a run will save into is a URL.

    Raises:
        StorageDetectionError: As in `local_path`.
    """
    for folder in folders:
        if folder is not None:
            local_path(folder)
