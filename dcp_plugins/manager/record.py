"""What a checkpoint of a manager says about itself: its step, its metrics, and when it was saved.

It is an item of the checkpoint's data, committed with it: a restart knows what the run before it measured, and a copy
of the directory knows when it was saved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.distributed.tensor import DTensor

from dcp_plugins.engine import load_from_keys
from dcp_plugins.errors import CorruptCheckpointError, listing
from dcp_plugins.storage import FileSystemReader

__all__ = ["RECORD_KEY", "SaveRecord", "read_record", "record_item"]

RECORD_KEY = "dcp_plugins_record"
"""The reserved key of the state dict."""


@dataclass(frozen=True, slots=True)
class SaveRecord:
    """One checkpoint, as far as policies are concerned."""

    step: int
    saved_at: float | None = None
    """Seconds since the epoch, by the clock of rank 0, when the save was begun; None if nobody has noted it."""
    metrics: Mapping[str, float] = field(default_factory=dict)


def record_item(step: int, saved_at: float, metrics: Mapping[str, Any] | None) -> str:
    """Make the item that holds the record: JSON, so that it is read as data.

    Raises:
        TypeError: A metric is no number, or sharded; lists all of them.
    """
    numbers: dict[str, float] = {}
    wrong = []
    for name, value in (metrics or {}).items():
        if isinstance(value, DTensor):
            # Its value is the group's affair, and this runs on one rank.
            wrong.append(f"{name} (DTensor: give its full_tensor(), which all ranks have to call)")
            continue
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError):
            wrong.append(f"{name} ({type(value).__name__})")
    if wrong:
        raise TypeError(f"metrics must be numbers or tensors of one element, found {listing(wrong)}")
    return json.dumps({"step": step, "saved_at": saved_at, "metrics": numbers})


def read_record(path: str | os.PathLike[str], step: int) -> SaveRecord:
    """Read the record of a committed checkpoint; one that something else saved has neither metrics nor a time.

    Args:
        path: The checkpoint's directory.
        step: Its step, by its name: a directory may have been renamed.

    Raises:
        CorruptCheckpointError: The record is there and is none.
        CheckpointException: The checkpoint cannot be read.
    """
    reader = _OnceReader(path)
    if RECORD_KEY not in reader.read_metadata().state_dict_metadata:
        return SaveRecord(step)
    item = load_from_keys(RECORD_KEY, storage_reader=reader)[RECORD_KEY]
    try:
        content = json.loads(item)
        return SaveRecord(step, float(content["saved_at"]), {k: float(v) for k, v in content["metrics"].items()})
    except (TypeError, ValueError, KeyError, AttributeError) as exc:
        raise CorruptCheckpointError(
            f"{path}: expected the record of a save under {RECORD_KEY!r}, found {str(item)[:80]!r}"
        ) from exc


class _OnceReader(FileSystemReader):
    """Reads the metadata once, although both we and the engine ask for it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if self.metadata is None:
            self.metadata = super().read_metadata(*args, **kwargs)
        return self.metadata
