"""Checking that a data file is the file that the checkpoint's save has written."""

from __future__ import annotations

from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.format.data_mark import MAX_MARK_BYTES, check_mark
from dcp_plugins.format.names import save_id_of
from dcp_plugins.storage.arrays import OpenFile, read_bytes

__all__ = ["check_data_file"]


def check_data_file(file: OpenFile, size: int, name: str, *, end: int, marked: bool) -> None:
    """Check that a data file is as long as the metadata needs, and its mark.

    Args:
        file: Open for reading.
        size: Its size in bytes.
        name: What the metadata calls it.
        end: Where the last item that the metadata names ends, in bytes.
        marked: Whether the save that wrote the metadata marked its files.

    Raises:
        CorruptCheckpointError: The file is too short, it is another file, or its mark is missing. The message begins
            with the file's name.
    """
    if size < end:
        raise CorruptCheckpointError(f"{name} has {size} bytes, the metadata names bytes up to {end}")
    save_id = save_id_of(name.rpartition("/")[2])
    if save_id is None and not marked:
        return  # Stock torch writes no marks.
    length = min(size, MAX_MARK_BYTES)
    check_mark(read_bytes(file, length, size - length, name), name, save_id, required=marked)
