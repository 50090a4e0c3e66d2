"""Checking that a data file is the one that the save of the checkpoint has written."""

from __future__ import annotations

from dcp_plugins.format.data_mark import MARK_BYTES, check_mark
from dcp_plugins.format.names import save_id_of
from dcp_plugins.storage.arrays import OpenFile, read_bytes

__all__ = ["check_mark_of"]


def check_mark_of(file: OpenFile, size: int, name: str, *, required: bool) -> None:
    """Check the mark at the end of a data file.

    Args:
        file: Open for reading.
        size: Its size in bytes.
        name: What the metadata calls it.
        required: Whether the save that wrote the metadata marked its files.

    Raises:
        CorruptCheckpointError: Another save wrote the file, or the mark is missing and required; begins with the name.
    """
    save_id = save_id_of(name.rpartition("/")[2])
    if save_id is None:
        return  # Stock torch's names have no id to compare with.
    length = min(size, MARK_BYTES)
    check_mark(read_bytes(file, length, size - length, name), save_id, required=required, where=name)
