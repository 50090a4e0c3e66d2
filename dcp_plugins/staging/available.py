"""How much memory a process may still take, before the system would end it for taking more."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["available_bytes"]

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Return this process's share of what the machine and its container have left; None where neither says."""
    found = [one for one in (_of_machine(), _of_container()) if one is not None]
    if not found:
        return None
    try:
        local_ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except ValueError:
        local_ranks = 1
    # All ranks of a host stage at the same time.
    return min(found) // local_ranks


def _of_machine() -> int | None:
    kilobytes = _field(_MEMINFO, "MemAvailable:")
    return None if kilobytes is None else kilobytes * 1024


def _of_container() -> int | None:
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        # Another version of control groups, or "max".
        return None
    # Cached files count as used, and are given up for whoever needs the memory; what is in tmpfs is not.
    cached = _field(_CGROUP / "memory.stat", "file") or 0
    in_memory_files = _field(_CGROUP / "memory.stat", "shmem") or 0
    return max(0, limit - used + cached - in_memory_files)


def _field(file: Path, name: str) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)
