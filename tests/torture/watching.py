"""What processes use, as the system says."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["children_of", "resources_of"]


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started and that have not ended."""
    found = []
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [int(child) for child in file.read_text().split()]
    return found


def resources_of(pid: int) -> dict[str, int]:
    """Return the memory, descriptors, threads and pieces of shared memory of a process and of its children."""
    used: dict[str, int] = {}
    for number, process in enumerate([pid, *sorted(children_of(pid))]):
        who = "own" if not number else f"child {number}"
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        used[f"{who} memory in bytes"] = int(status["VmRSS"].split()[0]) * 1024
        used[f"{who} threads"] = int(status["Threads"])
        used[f"{who} descriptors"] = len(os.listdir(f"/proc/{process}/fd"))
        maps = Path(f"/proc/{process}/maps").read_text().splitlines()
        used[f"{who} shared mappings"] = sum("/dev/shm" in line or "/memfd:" in line for line in maps)
    return used
