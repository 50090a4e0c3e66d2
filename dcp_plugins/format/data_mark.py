"""The mark at the end of a data file: which save wrote it.

The metadata names its data files, and each name carries the id of the save. If somebody puts a file of another save
under such a name, and the layouts are the same, sizes and checksums are right. Only the mark tells the files apart.
Layout::

    magic     8 bytes
    save id  32 bytes   hexadecimal digits, as in the file's name

Readers find data by the offsets in the metadata, so no reader but this package's sees the mark. The extras of a
metadata file say that the data files have one: those of earlier versions have none.
"""

from __future__ import annotations

from dcp_plugins.contract import Metadata
from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.format.saved_mappings import ATTACHED

__all__ = ["MARKED", "MARK_BYTES", "check_mark", "has_marked_files", "mark", "note_marked_files"]

MARKED = "marked_files"
"""The name among the extras of a metadata file."""

_MAGIC = b"DCPPfile"
_ID_BYTES = 32
MARK_BYTES = len(_MAGIC) + _ID_BYTES
# Beside torch's fields, so that it reaches every rank with the metadata.
_ATTRIBUTE = f"{ATTACHED}marked_files"


def mark(save_id: str) -> bytes:
    """Return the mark of a save."""
    return _MAGIC + save_id.replace("-", "").encode("ascii")


def check_mark(found: bytes, save_id: str, *, required: bool, where: str) -> None:
    """Compare the last ``MARK_BYTES`` of a data file with the mark of the save that its name says.

    Raises:
        CorruptCheckpointError: They are another save's mark, or none although one is required.
    """
    if found == mark(save_id):
        return
    if len(found) == MARK_BYTES and found.startswith(_MAGIC):
        other = found[len(_MAGIC) :].decode("ascii", "replace")
        raise CorruptCheckpointError(
            f"{where} was written by save {other}, expected save {save_id}: files of two checkpoints were mixed. Copy "
            "the checkpoint again, whole, or load another one"
        )
    if required:
        raise CorruptCheckpointError(
            f"{where} does not end with the mark of save {save_id}: it was truncated or replaced. Copy the checkpoint "
            "again, whole, or load another one"
        )


def note_marked_files(metadata: Metadata) -> None:
    """Note in metadata that the data files it names end with marks."""
    metadata.__dict__[_ATTRIBUTE] = True


def has_marked_files(metadata: Metadata) -> bool:
    """Tell whether metadata notes that its data files end with marks."""
    return bool(metadata.__dict__.get(_ATTRIBUTE))
