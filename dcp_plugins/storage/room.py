"""Whether a file system has room for a save, asked before anything is written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dcp_plugins.errors import listing
from dcp_plugins.storage.litter import unfinished

__all__ = ["Room"]

# On others, files may take less room than they have bytes: they compress, or find equal blocks.
_TAKE_WHAT_THEY_HOLD = frozenset({"ext2", "ext3", "ext4", "xfs", "tmpfs"})
_UNITS = ("bytes", "KB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True, slots=True)
class Room:
    """The room for new files in a checkpoint's directory, which is local."""

    path: Path
    """The checkpoint's directory."""
    folders: tuple[str, ...]
    """Those in it that hold files of saves, "" for itself."""
    id_of: Callable[[str], str | None]
    """Returns the save's id if a file, by its name, was certainly made by a save."""
    num_copies: int = 1
    """How many times a save writes the data."""

    def lacks(self, nbytes: int) -> bool:
        """Tell whether the file system cannot hold data of ``nbytes``; False if it does not say how much it can."""
        free = _free_bytes(self.path)
        return free is not None and nbytes * self.num_copies > free

    def require(self, nbytes: int) -> None:
        """Refuse data of ``nbytes`` that the file system cannot hold.

        Raises:
            OSError: (ENOSPC) Says what is needed and what there is.
        """
        free, needed = _free_bytes(self.path), nbytes * self.num_copies
        if free is None or needed <= free:
            return
        message = (
            f"the save has {_amount(needed)} to write, and the file system has {_amount(free)} free: "
            f"{_amount(needed - free)} are missing. Nothing was written. Make room; a checkpoint that is replaced stays"
            " until the new one is complete"
        )
        others = unfinished(self.path, self.folders, self.id_of)
        if others:
            message += (
                f". {_amount(sum(others.values()))} in the directory are of other saves, which may still be running "
                f"elsewhere; delete these files if you know that no save is: {listing(sorted(others))}"
            )
        raise OSError(errno.ENOSPC, message, os.fspath(self.path))


def _free_bytes(path: Path) -> int | None:
    """Return the most that new files can hold; None if nobody knows, or there is no limit."""
    try:
        status = os.statvfs(path)
        kind = _type_of(path.stat().st_dev)
    except OSError:
        return None  # The writing says what is wrong with the directory.
    # A tmpfs without a limit reports no blocks at all.
    if not status.f_blocks or kind not in _TAKE_WHAT_THEY_HOLD:
        return None
    # The superuser may use the blocks that ext4 reserves.
    return (status.f_bfree if os.geteuid() == 0 else status.f_bavail) * status.f_frsize


def _amount(nbytes: int) -> str:
    value, unit = float(nbytes), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


@lru_cache(64)
def _type_of(device: int) -> str | None:
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    # Device, then further fields; behind a hyphen the type.
    return next((line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == number), None)
