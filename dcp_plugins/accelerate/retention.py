"""The work after a commit: files for stock Accelerate, deletion of old checkpoints, and the choice of the best one."""

from __future__ import annotations

import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Collection
from functools import partial
from pathlib import Path

from dcp_plugins.accelerate.layout import (
    AUTOMATIC_NAMES,
    automatic_number,
    automatically_named,
    is_litter,
    kind_of,
    write_stock_files,
)
from dcp_plugins.errors import CheckpointError
from dcp_plugins.manager import KeepBest, KeepPolicy, SaveRecord, delete_checkpoint, read_record
from dcp_plugins.manager.retention import Mode, Selection

__all__ = ["best_checkpoint", "follow_commit", "remove_old"]

log = logging.getLogger(__name__)

_selections: defaultdict[Path, Selection] = defaultdict(Selection)
"""Keyed by folder: a call of `best_checkpoint` names a folder, not an accelerator."""


def follow_commit(path: Path, policy: KeepPolicy | None, *, removes_old: bool) -> None:
    """Write the files for stock and delete old checkpoints. Runs on the main process after the commit of ``path``."""
    try:
        write_stock_files(path)
        if removes_old:
            remove_old(path, policy)
    # The checkpoint is committed: an exception from here would look like a failed save.
    except Exception:
        log.warning(
            "%s is committed, but its files for stock Accelerate or the deletion of old checkpoints failed",
            path,
            exc_info=True,
        )


def remove_old(saved: Path, policy: KeepPolicy | None) -> None:
    """Delete what a policy lets go of the checkpoints beside the one just saved, and what killed saves left below them.

    Only ``checkpoint_<n>`` is looked at. To be called after a commit, while nothing else is saved there.
    """
    folder, own = saved.parent, automatic_number(saved.name)
    committed: list[int] = []
    uncommitted: dict[int, Path] = {}
    for path in automatically_named(folder):
        number = automatic_number(path.name)
        assert number is not None
        if kind_of(path) is None:
            uncommitted[number] = path
        else:
            committed.append(number)
    newest = max(committed, default=-1)
    for number, path in uncommitted.items():
        if number < newest and not path.is_symlink() and is_litter(path):
            shutil.rmtree(path)
            log.info("Removed %s, left by a save that was never committed", path)
    # Of a run that began again at 0 beside the checkpoints of one before it, what it saved is not among the latest.
    protected = set() if own is None else {own}
    selection = _selections[folder.resolve()]
    with selection.choosing_unkept(policy, partial(_records_in, folder), protected=protected) as unkept:
        for number in unkept:
            delete_checkpoint(folder / AUTOMATIC_NAMES.name(number))
    if newest not in (own, -1):
        log.warning(
            "%s has a lower number than checkpoint_%d beside it, which load_state() would take for the newest. If this"
            " run did not mean to begin again, call load_state() first; if it did, give it another project_dir",
            saved,
            newest,
        )


def best_checkpoint(folder: str | os.PathLike[str], metric: str, mode: Mode = "min") -> Path | None:
    """Find the committed checkpoint of automatic naming with the best value of a metric; None if none has it.

    This process does not delete it, whatever the policy, until it has been asked for another in the same folder.

    Args:
        folder: The directory ``checkpoints`` of the project.
        metric: Of those that ``save_state(metrics=...)`` was given.
        mode: "min" or "max".
    """
    folder = Path(folder)
    best = _selections[folder.resolve()].name_best(KeepBest(1, metric, mode), partial(_records_in, folder))
    return None if best is None else folder / AUTOMATIC_NAMES.name(best)


def _records_in(folder: Path, but: Collection[int]) -> list[SaveRecord]:
    """Return what the committed checkpoints of automatic naming say about themselves; of stock's, that they exist."""
    records = []
    for path in automatically_named(folder):
        number, kind = automatic_number(path.name), kind_of(path)
        assert number is not None
        if kind is not None and number not in but:
            records.append(_record_of(path, number) if kind == "ours" else SaveRecord(number))
    return records


def _record_of(path: Path, number: int) -> SaveRecord:
    try:
        return read_record(path, number)
    except (CheckpointError, OSError):
        # One that is damaged must not keep the others from being deleted.
        log.warning("Could not read when %s was saved", path, exc_info=True)
        return SaveRecord(number)
