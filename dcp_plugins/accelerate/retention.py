"""Which of the checkpoints that are named automatically go, and which is the best."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Collection
from pathlib import Path

from dcp_plugins.accelerate.layout import AUTOMATIC_NAMES, automatic_number, automatically_named, is_litter, kind_of
from dcp_plugins.errors import CheckpointError
from dcp_plugins.manager import KeepBest, KeepPolicy, SaveRecord, delete_checkpoint, read_record, steps_to_delete
from dcp_plugins.manager.retention import Mode

__all__ = ["best_checkpoint", "remove_old"]

log = logging.getLogger(__name__)

# By folder. Held while these are compared and changed, so that none is named best that is about to go.
_choice = threading.Lock()
_named_best: dict[Path, int] = {}
_going: dict[Path, set[int]] = {}


def remove_old(saved: Path, policy: KeepPolicy | None) -> None:
    """Delete what a policy lets go of the checkpoints beside the one just saved, and what killed saves left below them.

    Only ``checkpoint_<n>`` is looked at. To be called after a commit, while nothing else is saved there.
    """
    records, uncommitted = _records_in(saved.parent)
    newest = max((record.step for record in records), default=-1)
    for number, path in uncommitted.items():
        if number > newest or path.is_symlink() or not is_litter(path):
            continue
        shutil.rmtree(path)
        log.info("Removed %s, left by a save that was never committed", path)
    # Of a run that began again at 0 beside the checkpoints of one before it, it is not among the latest.
    own, place = automatic_number(saved.name), saved.parent.resolve()
    with _choice:
        named = _named_best.get(place)
        protected = {number for number in (own, named) if number is not None}
        unkept = steps_to_delete(policy, records, now=time.time(), protected=protected)
        _going[place] = set(unkept)
    try:
        for number in unkept:
            delete_checkpoint(saved.parent / AUTOMATIC_NAMES.name(number))
    finally:
        del _going[place]
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
    place = folder.resolve()
    with _choice:
        records, _ = _records_in(folder, but=_going.get(place, ()))
        best = next(iter(KeepBest(1, metric, mode).ranked(records)), None)
        if best is None:
            _named_best.pop(place, None)
            return None
        _named_best[place] = best.step
        return folder / AUTOMATIC_NAMES.name(best.step)


def _records_in(folder: Path, but: Collection[int] = ()) -> tuple[list[SaveRecord], dict[int, Path]]:
    """Return what the committed checkpoints of automatic naming say about themselves, and the directories of others."""
    records, uncommitted = [], {}
    for path in automatically_named(folder):
        number, kind = automatic_number(path.name), kind_of(path)
        assert number is not None
        if kind is None:
            uncommitted[number] = path
        elif number not in but:
            records.append(_record_of(path, number) if kind == "ours" else SaveRecord(number))
    return records, uncommitted


def _record_of(path: Path, number: int) -> SaveRecord:
    try:
        return read_record(path, number)
    except (CheckpointError, OSError):
        # One that is damaged must not keep the others from being deleted.
        log.warning("Could not read when %s was saved", path, exc_info=True)
        return SaveRecord(number)
