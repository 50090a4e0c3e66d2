"""The ``.metadata`` file: a pickle that stock torch reads, and a trailer behind it that only this package reads.

``metadata_pickle`` writes the pickle, ``metadata_trailer`` frames and checks the bytes, ``metadata_reader`` admits the
vocabulary and nothing else, and ``metadata_verifier`` checks what came out before anybody relies on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dcp_plugins.collector import collector_paused
from dcp_plugins.contract import Metadata
from dcp_plugins.format.data_mark import MARKED, note_marked_files
from dcp_plugins.format.metadata_pickle import PickleWriter
from dcp_plugins.format.metadata_reader import read_pickle, read_trusted_pickle
from dcp_plugins.format.metadata_trailer import JSON, add_trailer, split_trailer
from dcp_plugins.format.metadata_verifier import verify
from dcp_plugins.format.saved_mappings import EXTRA, attach, encoded_of, saved_mappings_of

__all__ = ["JSON", "Decoded", "MetadataEncoder", "decode", "decode_extras", "decode_with_extras", "encode"]


@dataclass(frozen=True, slots=True)
class Decoded:
    """The contents of a ``.metadata`` file."""

    metadata: Metadata
    """The description of the checkpoint, verified unless the pickle was trusted."""

    extras: Mapping[str, JSON]
    """The extras that the save recorded in the trailer; empty for files of stock torch."""

    has_trailer: bool
    """Whether the bytes were checked against a CRC-32; false for files of stock torch."""

    newer_version: int | None = None
    """Version of a trailer whose extras were skipped because a later version of this package wrote it."""


def encode(metadata: Metadata, *, extras: Mapping[str, JSON] | None = None) -> bytes:
    """Return the bytes of a ``.metadata`` file.

    Stock ``pickle.load`` reads them to an object equal to ``metadata``, with two liberties: a tuple of integers may
    come back as a ``torch.Size``, and a ``checkpoint_id`` that is a foreign ``os.PathLike`` as its string.

    Args:
        metadata: Not changed; pickled as it is when the call is made.
        extras: Recorded beside the pickle, for ``decode_extras``; torch does not see it.

    Raises:
        UnsupportedValueError: Something in ``metadata`` cannot be pickled, or in ``extras`` is no JSON.
    """
    return MetadataEncoder().encode(metadata, extras=extras)


class MetadataEncoder:
    """Encodes as ``encode`` does, and remembers how it has written what is the same for all saves of one plan.

    To be kept with the plan: the entries of ``state_dict_metadata`` must not change between two calls.
    """

    def __init__(self) -> None:
        self._pickle_writer = PickleWriter()

    def encode(self, metadata: Metadata, *, extras: Mapping[str, JSON] | None = None) -> bytes:
        """Return the bytes of a ``.metadata`` file."""
        record = encoded_of(metadata)
        recorded = {} if record is None else {EXTRA: record}
        return add_trailer(self._pickle_writer.write(metadata), {**(extras or {}), **recorded})


def decode(data: bytes | bytearray | memoryview, source: str, *, trust_pickle: bool = False) -> Metadata:
    """Read the bytes of a ``.metadata`` file, by us or by any torch, as data: no code in it runs.

    Fields that an older torch did not write have their defaults. A hostile file cannot make this call import, call or
    change anything outside the result. It can make it raise, or be slow.

    Args:
        data: The whole file.
        source: Where the bytes come from, for messages.
        trust_pickle: Read with ``pickle.loads``. Needed only for metadata with objects of a third party's classes;
            runs whatever code the file contains.

    Raises:
        UnsafeCheckpointError: The file names a class or function outside the vocabulary of DCP.
        CorruptCheckpointError: The file is truncated, damaged, or describes something impossible.
    """
    return decode_with_extras(data, source, trust_pickle=trust_pickle).metadata


def decode_with_extras(data: bytes | bytearray | memoryview, source: str, *, trust_pickle: bool = False) -> Decoded:
    """Do as ``decode``, and return the extras too."""
    pickled, trailer = split_trailer(bytes(data), source)
    with collector_paused():
        if trust_pickle:
            metadata = read_trusted_pickle(pickled, source)
        else:
            metadata = verify(read_pickle(pickled, source), source)
    if trailer is None:
        return Decoded(metadata, {}, has_trailer=False)
    if isinstance(trailer.extras.get(EXTRA), list):
        attach(metadata, trailer.extras[EXTRA])
        # Decoded here, so that a malformed record fails when the metadata is read, not in the middle of a load.
        saved_mappings_of(metadata)
    if trailer.extras.get(MARKED) is True:
        note_marked_files(metadata)
    newer_version = trailer.version if trailer.is_newer else None
    return Decoded(metadata, trailer.extras, has_trailer=True, newer_version=newer_version)


def decode_extras(data: bytes | bytearray | memoryview, source: str) -> dict[str, JSON]:
    """Return the extras alone, without unpickling; ``{}`` for a file of stock torch or of a later version of ours.

    Raises:
        CorruptCheckpointError: The trailer is there and does not fit the bytes before it.
    """
    trailer = split_trailer(bytes(data), source)[1]
    return trailer.extras if trailer is not None else {}
