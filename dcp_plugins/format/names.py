"""The names of a checkpoint's files: how saves make them, and how the files of saves are told from other files.

A save never writes to a name that a committed checkpoint may already use, so each name carries the id of its save::

    __<rank>_<index>-<save id>.distcp     data of one rank (stock torch: __<rank>_<index>.distcp)
    .metadata                             the commit: what it names, exists
    __<rank>.metadata                     the same for one rank, of saves without collectives
    <name>.<save id>.tmp                  any of the above before its rename

Reclaiming litter deletes files by their names, so recognition is strict: what does not match to the letter is not ours.
Other names, such as those of stock torch's data files, are deleted only if metadata that was replaced referred to them.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
from functools import lru_cache

from dcp_plugins.errors import UnsafeCheckpointError
from dcp_plugins.processes import is_running, machine, start_of

__all__ = [
    "DATA_SUFFIX",
    "METADATA_NAME",
    "check_relative",
    "check_save_id",
    "data_file_name",
    "is_data_name",
    "is_of_another_process",
    "is_stock_data_name",
    "is_stock_temporary_name",
    "is_temporary_name",
    "may_be_running",
    "metadata_name",
    "metadata_rank",
    "new_save_id",
    "process_of",
    "save_id_of",
    "temporary_name",
]

METADATA_NAME = ".metadata"
DATA_SUFFIX = ".distcp"

# Torch's writer spells a uuid4 with hyphens, new_save_id without; both are ids, nothing else is.
_ID = r"(?:[0-9a-f]{32}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
_PREFIX = r"[A-Za-z0-9_][A-Za-z0-9_.]*"

_SAVE_ID = re.compile(_ID)
_DATA_PREFIX = re.compile(_PREFIX)
_OWN_DATA = re.compile(rf"__[0-9]+_[0-9]+-({_ID}){re.escape(DATA_SUFFIX)}")
_OWN_TEMPORARY = re.compile(rf"(?:__[0-9]+)?\.metadata\.({_ID})\.tmp")
_TEMPORARY = re.compile(rf"[^/\\\0]+\.({_ID})\.tmp")
_STOCK_DATA = re.compile(r"__[0-9]+_[0-9]+\.distcp")
_STOCK_TEMPORARY = re.compile(r"(?:__[0-9]+)?\.metadata\.tmp")
_RANK_METADATA = re.compile(r"__(0|[1-9][0-9]*)\.metadata")
_DRIVE = re.compile(r"[A-Za-z]:")


def new_save_id() -> str:
    """Return an id that no other save has: 32 lower-case hexadecimal digits.

    The digits say which process made the id, so that the files of a killed save can be told from those of a running
    save: 8 digits of the machine, 6 of the process id, 8 of the time when the process began, and 10 that count from a
    random number.
    """
    return f"{_process_digits(os.getpid())}{next(_numbers) & 0xFF_FFFF_FFFF:010x}"


_PROCESS_DIGITS = 22
_numbers = itertools.count(random.SystemRandom().getrandbits(40))


@lru_cache(1)
def _process_digits(pid: int) -> str:
    return f"{_machine_digits(machine())}{pid & 0xFF_FFFF:06x}{_start_digits(start_of(pid))}"


@lru_cache(1)
def _machine_digits(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _start_digits(started: str | None) -> str:
    return f"{int(started or 0) & 0xFFFF_FFFF:08x}"


def is_of_another_process(save_id: str) -> bool:
    """Tell whether another process of this machine, such as the parent of this one, made an id."""
    digits = _process_digits(os.getpid())
    return save_id[:8] == digits[:8] and not save_id.startswith(digits)


def process_of(save_id: str) -> str:
    """Return what all ids that one process made have in common."""
    return save_id[:_PROCESS_DIGITS]


def may_be_running(save_id: str) -> bool | None:
    """Tell whether the process that made an id still runs; None if that was on another machine or is not known."""
    if "-" in save_id or save_id[:8] != _machine_digits(machine()):
        return None
    if save_id.startswith(_process_digits(os.getpid())):
        return True
    pid = int(save_id[8:14], 16)
    started = start_of(pid)
    if started is not None:
        return _start_digits(started) == save_id[14:22]
    return is_running(pid, None)


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


def data_file_name(prefix: str, index: int, save_id: str) -> str:
    """Name the ``index``-th data file of the rank whose storage prefix is ``prefix`` (``__<rank>_``).

    Later saves recognise the files of a killed one by that prefix, and by no other.
    """
    if _DATA_PREFIX.fullmatch(prefix) is None:
        raise ValueError(
            f"prefix of a data file must be letters, digits, '_' and '.', not starting with '.', got {prefix!r}"
        )
    if index < 0:
        raise ValueError(f"index of a data file must not be negative, got {index}")
    return f"{prefix}{index}-{check_save_id(save_id)}{DATA_SUFFIX}"


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
    return _TEMPORARY.fullmatch(name) is not None


def save_id_of(name: str) -> str | None:
    """Return the id of the save that made a file called ``name``, data or metadata before its rename.

    ``None`` for every other name: such a file may be somebody else's.
    """
    match = _OWN_DATA.fullmatch(name) or _OWN_TEMPORARY.fullmatch(name)
    return match.group(1) if match is not None else None


def is_data_name(name: str) -> bool:
    """Tell whether ``name`` may be that of a data file, whoever wrote it."""
    return name.endswith(DATA_SUFFIX)


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
