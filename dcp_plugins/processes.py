"""Processes of this machine: whether one still runs, and whether it works."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

__all__ = ["activity_of", "is_running", "is_stopped", "machine", "start_of"]


@lru_cache(1)
def machine() -> str:
    """Return the scope of process ids: the boot of a machine, and the pid namespace on it.

    If the system does not tell, the result is one that only this process and those that it forks have.
    """
    with suppress(OSError):
        # In a container /proc may be the host's, with other processes under the same numbers.
        if Path("/proc/self").readlink().name == str(os.getpid()):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    # The name of the host is not enough: containers may share it.
    return f"{os.uname().nodename}/{uuid.uuid4()}"


def start_of(pid: int) -> str | None:
    """Return when a process began, in ticks since the boot; None if it has ended, or cannot be asked."""
    try:
        fields = _fields_of(pid)
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _fields_of(pid: int) -> list[str]:
    """Return what the kernel says of a process, from its state on: the start is the twentieth field."""
    # The fields follow the name, which may hold anything.
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def activity_of(pid: int) -> tuple[str, tuple[int, ...]]:
    """Return the state of a process, as one letter (``T`` if it is stopped), and counters that grow while it works.

    Raises:
        OSError: It has ended, or cannot be asked.
    """
    state, *rest = _fields_of(pid)
    counters = [int(rest[10]), int(rest[11])]  # Ticks in its own code and in the kernel's.
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
        counters += [int(line.partition(":")[2]) for line in lines]
    return state, tuple(counters)


def is_stopped(pid: int) -> bool:
    """Tell whether a process of this machine has been stopped by a signal; False of one that cannot be asked."""
    try:
        return _fields_of(pid)[0] == "T"
    except OSError:
        return False


def is_running(pid: int, started: str | None) -> bool:
    """Tell whether the process on this machine that began at ``started`` still runs; one that cannot be asked does."""
    found = start_of(pid)
    if found is not None and started is not None:
        # The number alone may be another process's by now.
        return found == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # It is there, but has ended if its parent alone knows of it.
    return found is not None or not Path(f"/proc/{pid}/stat").exists()
