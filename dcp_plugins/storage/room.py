"""Whether a file system has room for a save, asked before anything is written."""

from __future__ import annotations

import errno
import os
from functools import lru_cache
from pathlib import Path

__all__ = ["check_room"]

# On others, files may take less room than they have bytes: they compress, or find equal blocks.
_TAKE_WHAT_THEY_HOLD = frozenset({"ext2", "ext3", "ext4", "xfs", "tmpfs", "ramfs"})


def check_room(path: Path, nbytes: int) -> None:
    """Raise if files of ``nbytes`` in a local directory are certain to find no room.

    Raises:
        OSError: (ENOSPC) Says what is needed and what there is.
    """
    try:
        status = os.statvfs(path)
    except FileNotFoundError:
        return  # It was deleted; the writing says so.
    free = status.f_bavail * status.f_frsize
    if nbytes > free and _type_of(path.stat().st_dev) in _TAKE_WHAT_THEY_HOLD:
        raise OSError(
            errno.ENOSPC,
            f"this rank's part of the checkpoint has {nbytes / 1e9:.3g} GB, and the file system has {free / 1e9:.3g} GB"
            " free. The checkpoint that is replaced stays until the new one is complete: make room for both",
            os.fspath(path),
        )


@lru_cache(64)
def _type_of(device: int) -> str | None:
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    # Device, then further fields; behind a hyphen the type.
    return next((line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == number), None)
