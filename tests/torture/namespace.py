"""File systems of a process's own: small, full or read-only ones, which no other process sees."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

__all__ = ["is_available", "make_read_only", "mount_small", "use_own_mounts"]

_CLONE_NEWNS = 0x20000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18


def is_available() -> bool:
    """Whether this process may mount; a child finds out, and nothing is changed here."""
    pid = os.fork()
    if pid == 0:
        try:
            use_own_mounts()
            os._exit(0)
        # Whatever it is, the answer is no.
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def use_own_mounts() -> None:
    """Give this thread, and those that it starts, mounts of its own.

    Raises:
        PermissionError: The system does not allow it.
    """
    _checked(ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS), "unshare")
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)


def mount_small(path: str | Path, nbytes: int) -> None:
    """Mount an empty file system in memory, of a size in bytes."""
    Path(path).mkdir(exist_ok=True)
    _mount("tmpfs", path, "tmpfs", 0, f"size={nbytes}")


def make_read_only(path: str | Path) -> None:
    """Let nothing be written below a directory through this process's mounts."""
    _mount(str(path), path, None, _MS_BIND)
    _mount(None, path, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY)


def _mount(source: str | None, target: str | Path, kind: str | None, flags: int, data: str | None = None) -> None:
    names = [None if name is None else os.fsencode(name) for name in (source, target, kind)]
    options = None if data is None else data.encode()
    _checked(ctypes.CDLL(None, use_errno=True).mount(*names, flags, options), f"mount {target}")


def _checked(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
