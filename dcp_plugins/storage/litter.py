"""Litter: files in a checkpoint's directory that a save has left and nobody needs."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from dcp_plugins.format.names import is_data_name, is_stock_data_name, is_stock_temporary_name, save_id_of
from dcp_plugins.storage.store import Store, files_named_by

__all__ = ["OldNames", "is_name_of_a_save", "litter", "old_names", "warn_of_litter"]

logger = logging.getLogger(__name__)


def litter(names: Iterable[str], referenced: Collection[str]) -> list[str]:
    """Return those of the names in a checkpoint's directory that only a save of ours can have made and nobody needs.

    Args:
        names: All in the directory.
        referenced: Names that committed metadata refers to.
    """
    return sorted(name for name in names if name not in referenced and save_id_of(name) is not None)


def is_name_of_a_save(name: str) -> bool:
    """Tell whether a file is called as saves, ours or torch's, call theirs."""
    return save_id_of(name) is not None or is_stock_data_name(name) or is_stock_temporary_name(name)


def warn_of_litter(path: os.PathLike[str] | str, failure: Exception) -> None:
    """Log, once for each directory, why a commit could not delete what is left over.

    The checkpoint is committed: what stays must not make its save look failed.
    """
    if os.fspath(path) not in _told:
        _told.add(os.fspath(path))
        logger.warning("could not delete what %s no longer needs; the next save tries again", path, exc_info=failure)


_told: set[str] = set()


@dataclass(frozen=True, slots=True)
class OldNames:
    """The names in a directory before a commit."""

    present: Collection[str]
    replaced: Collection[str]
    """Data files that the metadata which is to be replaced refers to, as far as their names do not tell."""

    def obsolete(self, kept: Collection[str]) -> list[str]:
        """Return the files that are of saves and not among those to be kept."""
        return sorted({*litter(self.present, kept), *self.replaced} - set(kept))


def old_names(store: Store, metadata_file: str, path: os.PathLike[str] | str) -> OldNames:
    """Look at a directory whose metadata is about to be replaced.

    Names that this package gives are recognised by their form. Others, such as stock torch's, may be anybody's: it
    takes a reading of the metadata, which is done where there are such names.

    Args:
        store: The directory's.
        metadata_file: The metadata that is to be replaced, if there is any.
        path: For the message, if the metadata cannot be read.
    """
    present: Collection[str] = ()
    replaced: Collection[str] = ()
    try:
        present = store.names() if store.can_list else ()
        others = {name for name in present if is_data_name(name) and save_id_of(name) is None}
        if others or not store.can_list:
            named = {name for name in files_named_by(store, metadata_file) if is_data_name(name)}
            replaced = named & others if store.can_list else named
    # The save replaces damaged metadata: it must not fail because the metadata cannot be read.
    except Exception:
        logger.warning("could not read what %s in %s refers to: its files stay", metadata_file, path, exc_info=True)
    return OldNames(present, replaced)
