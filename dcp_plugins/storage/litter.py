"""Litter: files that saves have left in a checkpoint's directory and that no checkpoint needs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dcp_plugins.errors import CheckpointError
from dcp_plugins.format.names import (
    METADATA_NAME,
    is_data_name,
    is_stock_data_name,
    is_stock_temporary_name,
    may_be_running,
    metadata_rank,
    process_of,
    save_id_of,
)
from dcp_plugins.storage.local import remove_files
from dcp_plugins.storage.store import LocalStore, Store, files_named_by

__all__ = [
    "OldNames",
    "is_name_of_a_save",
    "old_names",
    "reclaim_dead",
    "running_processes",
    "unfinished",
    "warn_of_litter",
]

logger = logging.getLogger(__name__)


def is_name_of_a_save(name: str) -> bool:
    """Tell whether a file is called as saves, ours or torch's, call theirs."""
    return save_id_of(name) is not None or is_stock_data_name(name) or is_stock_temporary_name(name)


def warn_of_litter(path: os.PathLike[str] | str, failure: Exception) -> None:
    """Log, once for each directory, why a commit could not delete what is left over.

    The checkpoint is committed: what stays must not make its save look failed.
    """
    if os.fspath(path) not in _warned_of:
        _warned_of.add(os.fspath(path))
        logger.warning("could not delete what %s no longer needs; the next save tries again", path, exc_info=failure)


_warned_of: set[str] = set()


def reclaim_dead(path: Path, folders: Iterable[str], id_of: Callable[[str], str | None]) -> None:
    """Before a save, delete what saves of processes that have ended left in its directory: it may need the room.

    A process of this machine has ended if no process with its id and start runs. Of a process elsewhere the files tell:
    it has ended if it has not written to them for a day. Nothing raises: what cannot be deleted stays.

    Args:
        path: The checkpoint's directory.
        folders: Those in it that hold files of saves, "" for itself.
        id_of: Returns the save's id if a file, by its name, was certainly made by a save of ours.
    """
    try:
        dead = {
            os.path.join(folder, name)
            for folder, name, save_id in _files_of_saves(path, folders, id_of)
            if _has_ended(save_id, os.path.join(path, folder), name)
        }
        if dead:
            # Files of committed checkpoints are mostly of processes that have ended, too.
            remove_files(path, sorted(dead - _committed(path, folders)))
    except (OSError, CheckpointError) as exc:
        warn_of_litter(path, exc)


def unfinished(path: Path, folders: Iterable[str], id_of: Callable[[str], str | None]) -> dict[str, int]:
    """Return the bytes of the files that belong to no committed checkpoint, by name; none if that cannot be told.

    After `reclaim_dead`, whose arguments this has, they are of saves that may be running.
    """
    try:
        found = {os.path.join(folder, name) for folder, name, _ in _files_of_saves(path, folders, id_of)}
        return {name: (path / name).stat().st_size for name in found - _committed(path, folders)}
    except (OSError, CheckpointError):
        return {}


def _files_of_saves(
    path: Path, folders: Iterable[str], id_of: Callable[[str], str | None]
) -> Iterator[tuple[str, str, str]]:
    """Yield folder, name and save id of the files that saves have made."""
    for folder in folders:
        # The save itself raises the error of a directory that cannot be listed.
        with suppress(OSError):
            for name in os.listdir(os.path.join(path, folder)):
                if (save_id := id_of(name)) is not None:
                    yield folder, name, save_id


def _committed(path: Path, folders: Iterable[str]) -> set[str]:
    """Return the files that committed metadata in the folders names."""
    return {
        os.path.join(folder, file)
        for folder in folders
        if (path / folder).is_dir()
        for name in os.listdir(path / folder)
        if name == METADATA_NAME or metadata_rank(name) is not None
        for file in files_named_by(LocalStore(path / folder), name)
    }


def _has_ended(save_id: str, folder: str, name: str) -> bool:
    running = may_be_running(save_id)
    if running is not None:
        return not running
    try:
        return time.time() - Path(folder, name).lstat().st_mtime > _SILENCE_SECONDS
    except FileNotFoundError:
        return False  # Another save, or its own, has deleted it.


_SILENCE_SECONDS = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class OldNames:
    """The names in a checkpoint's folders before a commit."""

    present: Collection[str]
    """All but those of other saves that are running."""
    replaced: Collection[str]
    """Data files that the metadata which is to be replaced refers to, as far as their names do not tell."""

    def obsolete(self, kept: Collection[str]) -> list[str]:
        """Return the files that are of saves and not among those to be kept."""
        of_saves = {name for name in self.present if _id_in(name) is not None}
        return sorted({*of_saves, *self.replaced} - set(kept))


def old_names(
    store: Store,
    metadata_file: str,
    path: os.PathLike[str] | str,
    *,
    folders: Iterable[str],
    kept: Collection[str],
    save_id: str,
) -> OldNames:
    """Look at a directory whose metadata is about to be replaced.

    Names that this package gives are recognised by their form. Others, such as stock torch's, may be anybody's; and a
    running process may have made a file for another save, or for the checkpoint that is replaced. It takes a reading of
    the metadata to know, which is done where there are such names.

    Args:
        store: The directory's.
        metadata_file: The metadata that is to be replaced, if there is any.
        path: For the message, if the metadata cannot be read.
        folders: Those in it that hold files of saves, "" for itself.
        kept: The files of the save.
        save_id: Its id.
    """
    present: set[str] = set()
    replaced: set[str] = set()
    try:
        if store.can_list:
            present = {os.path.join(folder, name) for folder in folders for name in store.names(folder)}
        ids = {name: _id_in(name) for name in present}
        of_stock = {name for name, found in ids.items() if found is None and is_data_name(name)}
        running = running_processes(filter(None, ids.values()), [save_id, *filter(None, map(_id_in, kept))])
        doubtful = {name for name, found in ids.items() if found is not None and process_of(found) in running}
        present -= doubtful
        if of_stock or doubtful or not store.can_list:
            named = {name for name in files_named_by(store, metadata_file) if is_data_name(name)}
            replaced = named & (of_stock | doubtful) if store.can_list else named
    # The save replaces damaged metadata: it must not fail because the metadata cannot be read.
    except Exception:
        logger.warning("could not read what %s in %s refers to: its files stay", metadata_file, path, exc_info=True)
    return OldNames(present, replaced)


def running_processes(save_ids: Iterable[str], own: Iterable[str]) -> set[str]:
    """Return which of the processes that made the ids are known to run, and may be writing files with these ids.

    Args:
        save_ids: Of any files.
        own: Of the files of the save that asks. Its processes are left out: they write nothing else.
    """
    by_process = {process_of(save_id): save_id for save_id in save_ids}
    of_others = by_process.keys() - set(map(process_of, own))
    return {process for process in of_others if may_be_running(by_process[process]) is True}


def _id_in(name: str) -> str | None:
    return save_id_of(name.rpartition("/")[2])
