"""Where the benchmark writes, and whether what it writes will fit."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

import click

__all__ = ["Place", "available_memory_bytes", "choose", "describe", "require_room"]

_SHARED_MEMORY = Path("/dev/shm")
_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})

# Containers, metadata and directories beside the tensors' bytes; the cost of 20,000 small tensors with room to spare.
_OVERHEAD_FACTOR, _OVERHEAD_BYTES = 1.05, 64 << 20
# Interpreter, torch and buffers of one process.
_PROCESS_BYTES = 400 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A directory that the benchmark is run in."""

    path: Path
    fs_type: str
    """As the kernel names it (``ext4``, ``tmpfs``), or ``unknown`` where it does not say."""

    @property
    def in_memory(self) -> bool:
        """Whether its files take main memory, so that syncing them does nothing."""
        return self.fs_type in _MEMORY_FILE_SYSTEMS


def describe(path: Path) -> Place:
    """Return the place at an existing directory."""
    return Place(path.resolve(), _fs_type(path.resolve()))


def choose(path: Path | None, disk: Path | None) -> list[Place]:
    """Return where to run: just ``path`` if given, else shared memory (where there is one) and a disk.

    A temporary directory that turns out to be in memory too is left out: it would repeat the first place.
    """
    if path is not None:
        return [describe(path)]
    places = [describe(_SHARED_MEMORY)] if _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK) else []
    on_disk = describe(disk if disk is not None else Path(tempfile.gettempdir()))
    if disk is not None or not (places and on_disk.in_memory):
        places.append(on_disk)
    return places


def require_room(place: Place, case: str, state_bytes: int, num_processes: int) -> None:
    """Raise a usage error, before anything is built, if a case fits neither the storage nor the memory.

    Memory holds the state dict and the target of the load; storage one checkpoint at a time, which counts as memory
    again where the storage is memory.
    """
    file_bytes = round(state_bytes * _OVERHEAD_FACTOR) + _OVERHEAD_BYTES
    memory_bytes = 2 * state_bytes + num_processes * _PROCESS_BYTES + (file_bytes if place.in_memory else 0)
    problems = []
    free = shutil.disk_usage(place.path).free
    if free < file_bytes:
        problems.append(f"{_gb(file_bytes)} of space in {place.path} ({_gb(free)} free)")
    available = available_memory_bytes()
    if available is not None and available < memory_bytes:
        problems.append(f"{_gb(memory_bytes)} of memory ({_gb(available)} available)")
    if problems:
        raise click.UsageError(
            f"case '{case}' needs {' and '.join(problems)}; give another --path or --disk, or a --scale below 1"
        )


def available_memory_bytes() -> int | None:
    """Return the memory that can be had without swapping, or None where the kernel does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes[0] * 1024 if kilobytes else None


def _fs_type(path: Path) -> str:
    """Find the mount that holds the path: the longest mount point that is a prefix, the last one mounted there."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    best, fs_type = -1, "unknown"
    for line in lines:
        fields, _, rest = line.partition(" - ")
        mount_point = Path(fields.split()[4].encode().decode("unicode_escape"))
        if path.is_relative_to(mount_point) and len(mount_point.parts) >= best:
            best, fs_type = len(mount_point.parts), rest.split()[0]
    return fs_type


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
