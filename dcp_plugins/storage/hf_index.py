"""``model.safetensors.index.json``: which file each tensor is in, and which save the files are of."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcp_plugins.errors import CorruptCheckpointError, listing
from dcp_plugins.format.safetensors_header import INDEX_NAME, Header, save_of
from dcp_plugins.storage.regular import read_regular

__all__ = ["Index", "encode_index", "files_of_one_save", "read_index"]

logger = logging.getLogger(__name__)

_MAX_BYTES = 1 << 28
_SAVE_ID = "dcp_save_id"


@dataclass(frozen=True, slots=True)
class Index:
    """A directory's index; empty if there is none."""

    files: dict[str, str]
    """Name of the file by tensor name. Untrusted: compare it with names that exist, never open it."""
    save_id: str | None = None
    """The save that published the index; None for other writers'."""


def encode_index(files: Mapping[str, str], total_bytes: int, save_id: str) -> bytes:
    """Return the content of an index."""
    content = {"metadata": {"total_size": total_bytes, _SAVE_ID: save_id}, "weight_map": dict(files)}
    return json.dumps(content, indent=2).encode()


def read_index(directory: Path) -> Index:
    """Return a directory's index.

    Raises:
        CorruptCheckpointError: It is not an index.
    """
    path = directory / INDEX_NAME
    try:
        content: Any = json.loads(read_regular(directory, INDEX_NAME, max_bytes=_MAX_BYTES))
        files, attributes = content["weight_map"], content.get("metadata") or {}
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise ValueError("weight_map must map names to names of files")
        return Index(files, attributes.get(_SAVE_ID))
    except FileNotFoundError:
        return Index({})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise CorruptCheckpointError(f"{path} is not an index of safetensors files: {exc!r}") from exc


def files_of_one_save(directory: Path, headers: Mapping[str, Header]) -> dict[str, Header]:
    """Leave out the files of an interrupted save, or of the save that it was to replace.

    If several saves are complete, the index says which one is the checkpoint.

    Args:
        directory: Where the files are.
        headers: The header of each file, by name.

    Raises:
        CorruptCheckpointError: No save has all its files here, or several have.
    """
    present: dict[tuple[str, int], list[str]] = {}
    for name, header in headers.items():
        save = save_of(header)
        if save is not None:
            present.setdefault(save, []).append(name)
    complete = [save for save, names in present.items() if len(names) >= save[1]]
    if len(present) == len(complete) < 2:
        return dict(headers)
    if len(complete) > 1:
        complete = [save for save in complete if save[0] == read_index(directory).save_id]
    if len(complete) != 1:
        counts = [
            f"{len(names)} of the {save[1]} files of save {save[0]} ({listing(names)})"
            for save, names in present.items()
        ]
        raise CorruptCheckpointError(
            f"{directory} holds {listing(counts)}: a save into it was interrupted, or files were deleted since; load "
            "another checkpoint, or bring back the files of one save and delete those of the others"
        )
    others = {name for save, names in present.items() if save != complete[0] for name in names}
    logger.warning("%s: left out what an interrupted save wrote or was to replace: %s", directory, listing(others))
    return {name: header for name, header in headers.items() if name not in others}
