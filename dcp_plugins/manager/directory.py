"""Directories of checkpoints: which names are steps, which of them count, and how one is deleted.

A checkpoint counts from the instant its ``.metadata`` is there. File times are never asked: copies and restored backups
have others.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcp_plugins.contract import StorageInfo
from dcp_plugins.errors import (
    CheckpointError,
    CheckpointException,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsafeCheckpointError,
    listing,
)
from dcp_plugins.format.data_mark import has_marked_files
from dcp_plugins.format.metadata import decode_with_extras
from dcp_plugins.format.names import METADATA_NAME, metadata_rank
from dcp_plugins.manager.failed_saves import missing_commit
from dcp_plugins.storage.litter import is_name_of_a_save
from dcp_plugins.storage.local import sync_directory
from dcp_plugins.storage.marks import check_data_file
from dcp_plugins.storage.regular import FileIdentity, open_regular, read_regular
from dcp_plugins.user_warnings import warn_user

__all__ = [
    "Commit",
    "StepNames",
    "commit_of",
    "committed_steps",
    "delete_checkpoint",
    "good_steps",
    "is_committed",
    "is_damage",
    "newest_good",
    "remove_if_uncommitted",
    "uncommitted_steps",
    "verify_checkpoint",
]

log = logging.getLogger(__name__)

_PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class StepNames:
    """How the checkpoint of a step is called: a prefix and the step in decimal digits; no other name is a step's."""

    prefix: str = "step_"
    """The text before the number, such as "checkpoint-"."""

    def __post_init__(self) -> None:
        if not self.prefix or "/" in self.prefix or "\0" in self.prefix or self.prefix[-1].isdigit():
            raise ValueError(
                "prefix must be part of a file name that does not end in a digit, such as 'step_' or 'checkpoint-',"
                f" got {self.prefix!r}"
            )

    def name(self, step: int) -> str:
        """Name the directory of a step."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        return f"{self.prefix}{step}"

    def step_of(self, name: str) -> int | None:
        """Return the step whose directory is called ``name``; None if it is no step's."""
        match = re.fullmatch(rf"{re.escape(self.prefix)}(0|[1-9][0-9]*)", name, re.ASCII)
        return int(match.group(1)) if match is not None else None


def is_committed(path: _PathLike) -> bool:
    """Tell whether ``path`` is a checkpoint: a directory whose ``.metadata`` has been published."""
    return Path(path, METADATA_NAME).is_file()


def delete_checkpoint(path: _PathLike) -> None:
    """Delete a checkpoint, the commit first; of a link, the link only. What is not there is no error.

    Killed half-way, it leaves a directory that is no checkpoint.
    """
    path = Path(path)
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.is_dir():
        (path / METADATA_NAME).unlink(missing_ok=True)
        sync_directory(path)
        shutil.rmtree(path)
    else:
        return
    log.debug("Deleted checkpoint %s", path)


def verify_checkpoint(path: _PathLike) -> None:
    """Check that a checkpoint is whole: its metadata can be read, and each data file is there, of its size and save.

    The data is not read: a flipped bit in a data file is found by the load, which compares checksums.

    Raises:
        CheckpointNotFoundError: It has never been committed.
        CorruptCheckpointError: The metadata is damaged, or files are missing or too short; lists all of them.
    """
    path = Path(path)
    source = path / METADATA_NAME
    try:
        content = read_regular(path, METADATA_NAME)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as exc:
        raise CheckpointNotFoundError(f"expected a committed checkpoint in {path}, but {missing_commit(path)}") from exc
    decoded = decode_with_extras(content, str(source))
    exact: Any = decoded.extras.get("files")
    sizes: dict[str, int] = dict(exact) if isinstance(exact, dict) else {}
    ends: dict[str, int] = {}
    for info in (decoded.metadata.storage_data or {}).values():
        if isinstance(info, StorageInfo):
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    problems = []
    for name in sorted(sizes.keys() | ends.keys()):
        try:
            fd, status = open_regular(path, name)
        except (FileNotFoundError, NotADirectoryError):
            problems.append(f"{name} is missing")
            continue
        except IsADirectoryError:
            problems.append(f"{name} is a directory, not a file")
            continue
        found = status.st_size
        try:
            if name in sizes and found != sizes[name]:
                problems.append(f"{name} has {found} bytes, it was written with {sizes[name]}")
            else:
                marked = has_marked_files(decoded.metadata)
                check_data_file(fd, found, name, end=ends.get(name, 0), marked=marked)
        except CorruptCheckpointError as exc:
            problems.append(str(exc))
        finally:
            os.close(fd)
    if problems:
        raise CorruptCheckpointError(f"{path}: data files do not fit the metadata: {listing(problems)}")


def is_damage(exc: CheckpointException) -> bool:
    """Tell whether all failures of the ranks are of damaged or missing data."""
    kinds = (CorruptCheckpointError, CheckpointNotFoundError)
    failures = [failure for failure, _ in exc.failures.values()]
    # A value that is refused as unsafe is not damaged, and every other checkpoint of the run has it too.
    return all(isinstance(one, kinds) and not isinstance(one, UnsafeCheckpointError) for one in failures)


def committed_steps(root: _PathLike, names: StepNames = StepNames()) -> list[int]:
    """Return the steps of which a committed checkpoint is in ``root``, ascending."""
    return [step for step in _steps(Path(root), names) if is_committed(Path(root, names.name(step)))]


def uncommitted_steps(root: _PathLike, names: StepNames = StepNames()) -> list[int]:
    """Return the steps of which a directory without a commit is in ``root``, ascending."""
    return [step for step in _steps(Path(root), names) if not is_committed(Path(root, names.name(step)))]


Commit = FileIdentity | None
"""Tells one commit of a directory from another; None stands for a directory without one."""


def commit_of(path: _PathLike) -> Commit:
    """Return what tells the commit of a directory from the next one."""
    try:
        return FileIdentity.of(Path(path, METADATA_NAME).stat())
    except OSError:
        return None


def good_steps(root: _PathLike, names: StepNames = StepNames(), seen: dict[int, Commit] | None = None) -> Iterator[int]:
    """Yield the steps whose checkpoints are committed and whole, the newest first; warn of each one skipped.

    Another process may delete checkpoints and commit new ones meanwhile, also of a step that was there before: the
    directory is listed anew at the end.

    Args:
        root: Where the directories of the steps are.
        names: How they are called.
        seen: Commits to leave out, by step; each that is looked at is added.
    """
    seen = {} if seen is None else seen
    while fresh := [
        step for step in _steps(Path(root), names) if not _was_seen(Path(root, names.name(step)), step, seen)
    ]:
        for step in reversed(fresh):
            path = Path(root, names.name(step))
            seen[step] = commit_of(path)
            try:
                verify_checkpoint(path)
            except (CheckpointError, OSError) as exc:
                if path.is_dir():
                    warn_user(f"Skipped {path}, which is no good checkpoint: {exc}")
                continue
            yield step


def _was_seen(path: Path, step: int, seen: Mapping[int, Commit]) -> bool:
    return step in seen and seen[step] == commit_of(path)


def newest_good(root: _PathLike, names: StepNames = StepNames()) -> Path | None:
    """Find the checkpoint of the highest step that is committed and whole, or None; warn of newer ones skipped."""
    for step in good_steps(root, names):
        return Path(root, names.name(step))
    return None


def remove_if_uncommitted(path: _PathLike, also: Collection[str] = ()) -> bool:
    """Delete the directory of one killed save, and return whether it was one.

    Only a directory without a commit that holds nothing but files of checkpoints is deleted. Call it while nothing is
    being saved there: a save in progress looks the same as one that was killed.

    Args:
        path: The directory.
        also: Names of further files that the saves in question leave.
    """
    path = Path(path)
    if path.is_symlink() or not path.is_dir():
        return False
    names = os.listdir(path)
    # A save without collectives is committed too, by the metadata of each rank.
    if any(name == METADATA_NAME or metadata_rank(name) is not None for name in names):
        return False
    if not all(name in also or is_name_of_a_save(name) for name in names):
        return False
    shutil.rmtree(path)
    log.info("Removed %s, left by a save that was never committed", path)
    return True


def _steps(root: Path, names: StepNames) -> list[int]:
    """Return the steps of which there is a directory, committed or not, ascending."""
    if not root.is_dir():
        return []
    found = ((names.step_of(name), name) for name in os.listdir(root))
    return sorted(step for step, name in found if step is not None and (root / name).is_dir())
