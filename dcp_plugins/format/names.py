"""The names of a checkpoint's files: how they are made, and how they are told from everybody else's.

A save never writes to a name that a committed checkpoint may already use, so each name carries the id of its save::

    __<rank>_<index>-<save id>.distcp     data of one rank (stock torch: __<rank>_<index>.distcp)
    .metadata                             the commit: what it names, exists
    __<rank>.metadata                     the same for one rank, of saves without collectives
    <name>.<save id>.tmp                  any of the above before its rename

Reclaiming litter deletes files by their names, so recognition is strict: what does not match to the letter is not ours.
"""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path

from dcp_plugins.errors import UnsafeCheckpointError

__all__ = [
    "DATA_SUFFIX",
    "METADATA_NAME",
    "check_relative",
    "check_save_id",
    "data_file_name",
    "is_stock_data_name",
    "is_stock_temporary_name",
    "is_temporary_name",
    "metadata_name",
    "metadata_rank",
    "new_save_id",
    "safe_join",
    "save_id_of",
    "temporary_name",
]

METADATA_NAME = ".metadata"
DATA_SUFFIX = ".distcp"
_DATA_SUFFIXES = (DATA_SUFFIX, ".safetensors")

# Torch's writer spells a uuid4 with hyphens, new_save_id without; both are ids, nothing else is.
_ID = r"(?:[0-9a-f]{32}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
_PREFIX = r"[A-Za-z0-9_][A-Za-z0-9_.]*"
_SUFFIX = "|".join(re.escape(suffix) for suffix in _DATA_SUFFIXES)

_SAVE_ID = re.compile(_ID)
_DATA_PREFIX = re.compile(_PREFIX)
_OWN_DATA = re.compile(rf"{_PREFIX}-({_ID})(?:{_SUFFIX})")
_OWN_TEMPORARY = re.compile(rf"[^/\\\0]+\.({_ID})\.tmp")
_STOCK_DATA = re.compile(r"__[0-9]+_[0-9]+\.distcp")
_STOCK_TEMPORARY = re.compile(r"(?:__[0-9]+)?\.metadata\.tmp")
_RANK_METADATA = re.compile(r"__(0|[1-9][0-9]*)\.metadata")
_DRIVE = re.compile(r"[A-Za-z]:")


def new_save_id() -> str:
    """Return an id that no other save has: 32 lower-case hexadecimal digits."""
    return uuid.uuid4().hex


def check_save_id(save_id: str) -> str:
    """Return ``save_id`` if it is the spelling of a uuid, which is what recognition of litter relies on.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(save_id, str) or _SAVE_ID.fullmatch(save_id) is None:
        raise ValueError(
            f"save id must be a uuid in lower-case hexadecimal digits, with or without hyphens, got {save_id!r}; "
            "make one with new_save_id()"
        )
    return save_id


def data_file_name(prefix: str, index: int, save_id: str, suffix: str = DATA_SUFFIX) -> str:
    """Name the ``index``-th data file of the rank whose storage prefix is ``prefix`` (``__<rank>_``)."""
    if _DATA_PREFIX.fullmatch(prefix) is None:
        raise ValueError(
            f"prefix of a data file must be letters, digits, '_' and '.', not starting with '.', got {prefix!r}"
        )
    if index < 0:
        raise ValueError(f"index of a data file must not be negative, got {index}")
    if suffix not in _DATA_SUFFIXES:
        raise ValueError(f"suffix of a data file must be one of {', '.join(_DATA_SUFFIXES)}, got {suffix!r}")
    return f"{prefix}{index}-{check_save_id(save_id)}{suffix}"


def metadata_name(rank: int | None = None) -> str:
    """Name the metadata file of the whole checkpoint, or of one ``rank`` that saved without collectives."""
    if rank is None:
        return METADATA_NAME
    if rank < 0:
        raise ValueError(f"rank must not be negative, got {rank}")
    return f"__{rank}{METADATA_NAME}"


def metadata_rank(name: str) -> int | None:
    """Return the rank whose metadata file is called ``name``; ``None`` if it is no rank's (``.metadata`` included)."""
    match = _RANK_METADATA.fullmatch(name)
    return int(match.group(1)) if match is not None else None


def temporary_name(name: str, save_id: str) -> str:
    """Name the file that will be renamed to ``name`` when it is complete."""
    if not name or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"expected the name of a file without its directory, got {name!r}")
    return f"{name}.{check_save_id(save_id)}.tmp"


def is_temporary_name(name: str) -> bool:
    """Tell whether ``name`` is one that ``temporary_name`` gives."""
    return _OWN_TEMPORARY.fullmatch(name) is not None


def save_id_of(name: str) -> str | None:
    """Return the id of the save that made a file called ``name``, data or temporary; ``None`` for any other name."""
    match = _OWN_DATA.fullmatch(name) or _OWN_TEMPORARY.fullmatch(name)
    return match.group(1) if match is not None else None


def is_stock_data_name(name: str) -> bool:
    """Tell whether ``name`` is one that torch's own writer gives to data files (``__0_0.distcp``)."""
    return _STOCK_DATA.fullmatch(name) is not None


def is_stock_temporary_name(name: str) -> bool:
    """Tell whether ``name`` is one that torch's own writer gives to metadata before its rename."""
    return _STOCK_TEMPORARY.fullmatch(name) is not None


def check_relative(relative: str) -> str:
    """Return ``relative`` if, by its spelling alone, it stays below whatever directory it is joined to.

    Parts are separated by ``/``. The rules are the same on every operating system, so that a checkpoint is not safe
    on one and harmful on another.

    Raises:
        UnsafeCheckpointError: It is empty or absolute, has an empty, ``.`` or ``..`` part, a NUL, a backslash, or a
            drive letter.
    """
    reason = _why_unsafe(relative)
    if reason is not None:
        raise UnsafeCheckpointError(
            f"file name {relative!r} in the checkpoint's metadata {reason}; expected the name of a file inside the "
            "checkpoint's directory. No save writes such a name: load the checkpoint only if you trust its origin"
        )
    return relative


def _why_unsafe(relative: object) -> str | None:
    if not isinstance(relative, str):
        return f"is a {type(relative).__name__}, not a string"
    if not relative:
        return "is empty"
    if "\0" in relative:
        return "contains a NUL"
    if "\\" in relative:
        return "contains a backslash"
    if relative.startswith("/") or _DRIVE.match(relative):
        return "is absolute"
    if any(part in ("", ".", "..") for part in relative.split("/")):
        return "has an empty, '.' or '..' part"
    return None


def safe_join(root: Path, relative: str) -> Path:
    """Return ``root / relative`` if that is inside ``root``, symbolic links followed.

    A link out of ``root`` is refused, except into the ``blobs`` of the same Hugging Face cache entry, whose snapshots
    are made of such links. The links are looked at now: who can change the directory later can still redirect a name.

    Raises:
        UnsafeCheckpointError: The spelling (see ``check_relative``) or a link leads outside.
    """
    path = root / check_relative(relative)
    # The common case costs no walk up the directory tree: a plain name that is no link cannot lead anywhere else.
    if "/" not in relative and not path.is_symlink():
        return path
    real_root = os.path.realpath(root)
    real = os.path.realpath(path)
    if real.startswith(os.path.join(real_root, "")) or _is_hub_blob(real_root, real):
        return path
    raise UnsafeCheckpointError(
        f"file {relative!r} of the checkpoint in {root} is reached through a symbolic link to {real}, outside the "
        "checkpoint's directory; if you trust it, copy the checkpoint with links followed (cp -rL) and load the copy"
    )


def _is_hub_blob(real_root: str, real: str) -> bool:
    """Tell whether ``real`` is a blob of the cache entry of which ``real_root`` is (part of) a snapshot."""
    parts = Path(real_root).parts
    if "snapshots" not in parts:
        return False
    last = len(parts) - 1 - parts[::-1].index("snapshots")
    return os.path.dirname(real) == os.path.join(*parts[:last], "blobs") if last > 0 else False
