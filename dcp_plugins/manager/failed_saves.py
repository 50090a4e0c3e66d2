"""Why saves of this process failed, by directory: an error of a later load of the directory names the cause."""

from __future__ import annotations

import os
from pathlib import Path

from dcp_plugins.errors import CheckpointException, listing
from dcp_plugins.format.names import METADATA_NAME

__all__ = ["failure_of", "forget_failure", "missing_commit", "note_failure"]

_failures: dict[str, str] = {}
"""The failure in one line, by the real path of the directory. The exception would keep the snapshot in memory."""


def note_failure(path: str | os.PathLike[str], failure: BaseException) -> None:
    """Remember why the last save into a directory failed."""
    _failures[os.path.realpath(path)] = _in_one_line(failure)


def forget_failure(path: str | os.PathLike[str]) -> None:
    """Forget why the last save into a directory failed: another save into it begins."""
    _failures.pop(os.path.realpath(path), None)


def missing_commit(path: str | os.PathLike[str]) -> str:
    """Say why there is no checkpoint in a directory, as the end of a sentence that names the directory."""
    path = Path(path)
    if not path.exists():
        return "it does not exist"
    if not path.is_dir():
        return "it is a file, not a directory"
    return f"it has no {METADATA_NAME}: {failure_of(path) or 'the save into it never finished'}"


def failure_of(path: str | os.PathLike[str]) -> str | None:
    """Say why the last save of this process into a directory failed; None if none has."""
    failure = _failures.get(os.path.realpath(path))
    return None if failure is None else f"the save into it failed: {failure}"


def _in_one_line(failure: BaseException) -> str:
    if not isinstance(failure, CheckpointException):
        return _described(failure)
    return listing(f"rank {rank}: {_described(exc)}" for rank, (exc, _) in failure.failures.items())


def _described(exc: BaseException) -> str:
    lines = str(exc).splitlines()
    return f"{type(exc).__name__}: {lines[0]}" if lines else type(exc).__name__
