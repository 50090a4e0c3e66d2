"""``model.safetensors.index.json``: which file each tensor is in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.format.safetensors_header import INDEX_NAME
from dcp_plugins.storage.regular import read_regular

__all__ = ["Index", "encode_index", "read_index"]

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
