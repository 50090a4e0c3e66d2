"""The mark at the end of a data file: the name under which a save wrote it.

The metadata names its data files, and each name carries the id of the save and the number of the file. If somebody puts
another file under such a name, of another save or of the same one, and both have the same layout, sizes and checksums
are right. Only the mark tells the files apart. Layout::

    magic     8 bytes
    name      the file's name, without folders

Readers find data by the offsets in the metadata, so no reader but this package's sees the mark. The extras of a
metadata file say that the data files have one: those of earlier versions have none. For a time there were marks of the
save's id alone, without hyphens.
"""

from __future__ import annotations

from dcp_plugins.contract import Metadata
from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.format.saved_mappings import ATTACHED

__all__ = ["MARKED", "MAX_MARK_BYTES", "check_mark", "has_marked_files", "mark", "note_marked_files"]

MARKED = "marked_files"
"""The name among the extras of a metadata file."""

_MAGIC = b"DCPPfile"
# File systems allow names of 255 bytes.
MAX_MARK_BYTES = len(_MAGIC) + 255
# Beside torch's fields, so that it reaches every rank with the metadata.
_ATTRIBUTE = f"{ATTACHED}marked_files"


def mark(name: str) -> bytes:
    """Return the mark of a file."""
    return _MAGIC + _base(name).encode()


def check_mark(end: bytes, name: str, save_id: str | None, *, required: bool) -> None:
    """Compare the mark of a data file with the file's name.

    Args:
        end: The last ``MAX_MARK_BYTES`` of the file, or all of it.
        name: What the metadata calls the file.
        save_id: The id of the save in the name, if there is one.
        required: Refuse a file without a mark.

    Raises:
        CorruptCheckpointError: The mark is another file's, or there is none although one is required. The message
            begins with the file's name.
    """
    _, magic, found = end.rpartition(_MAGIC)
    expected = [text.encode() for text in (_base(name), (save_id or "").replace("-", "")) if text]
    if magic and found in expected:
        return
    if magic and not any(text.startswith(found) for text in expected):
        raise CorruptCheckpointError(
            f"{name} was written as {found.decode('utf-8', 'replace')}: files were mixed up. Copy the checkpoint "
            "again, whole, or load another one"
        )
    if required:
        raise CorruptCheckpointError(
            f"{name} does not end with the mark of its name: it was truncated or replaced. Copy the checkpoint again, "
            "whole, or load another one"
        )


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def note_marked_files(metadata: Metadata) -> None:
    """Note in metadata that the data files it names end with marks."""
    metadata.__dict__[_ATTRIBUTE] = True


def has_marked_files(metadata: Metadata) -> bool:
    """Tell whether metadata notes that its data files end with marks."""
    return bool(metadata.__dict__.get(_ATTRIBUTE))
