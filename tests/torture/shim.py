"""The system calls of a campaign's processes: counted, recorded, failed, or ended with a kill (see ``shim.c``)."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

__all__ = ["Action", "Call", "CallFault", "Kind", "Shim", "is_preloaded", "recorded", "run_preloaded"]

_SOURCE = Path(__file__).with_name("shim.c")
_CONTROL = "TORTURE_CONTROL"
_LIBRARY = "TORTURE_SHIM"
_FIELDS = (
    "armed", "seen", "struck", "mask", "nth", "action", "error", "lasting", "recording", "root", "log"
)  # fmt: skip
_RECORD = struct.Struct("@IILlIII4x")


class Kind(IntEnum):
    """A kind of system call, as ``shim.c`` numbers them."""

    OPEN = 0
    CREATE = 1
    """An ``open`` for writing."""
    WRITE = 2
    SYNC = 3
    DIRSYNC = 4
    RENAME = 5
    UNLINK = 6
    MKDIR = 7
    RMDIR = 8
    LINK = 9
    TRUNCATE = 10
    READ = 11


CHANGING = tuple(kind for kind in Kind if kind not in (Kind.OPEN, Kind.READ))
ALL = tuple(Kind)


class Action(IntEnum):
    """What a fault does, as ``shim.c`` numbers it."""

    NOTHING = 0
    KILL = 1
    KILL_AFTER = 2
    TEAR = 3
    """Half of a write is done, then the process dies."""
    FAIL = 4
    FAIL_AFTER = 5
    """The call is done, and reports an error all the same."""
    SHORT = 6
    """Half of a read or write is done, and the call says so."""
    STOP = 7


@dataclass(frozen=True)
class CallFault:
    """What goes wrong with the ``nth`` call, from 0."""

    nth: int
    action: Action
    error: int = 0
    lasting: bool = False
    """Whether all later calls of the same kind fail too."""

    def __str__(self) -> str:
        name = f" {errno.errorcode[self.error]}" if self.error else ""
        return f"{self.action.name}{name}{' for good' if self.lasting else ''} at call {self.nth}"


@dataclass(frozen=True)
class Call:
    """A recorded call.

    Attributes:
        made: Of a ``CREATE``: whether the file was not there before.
        inode: The number of the file or directory that the call is about.
        offset: Of a ``WRITE``: where in the file; of a ``TRUNCATE``: the new length. Both in bytes.
        path: Relative to the root; empty for calls on descriptors, and for the root itself.
        other: The new name, of a ``RENAME`` and a ``LINK``.
        data: What was written.
    """

    kind: Kind
    made: bool
    inode: int
    offset: int
    path: str
    other: str
    data: bytes


def is_preloaded() -> bool:
    """Whether this process runs under the shim."""
    return _CONTROL in os.environ


def run_preloaded(arguments: list[str]) -> int:
    """Run ``python arguments`` under the shim, which is built first, and return its exit status.

    Raises:
        RuntimeError: There is no C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("the campaigns on system calls need a C compiler: install gcc or clang")
    with tempfile.TemporaryDirectory(prefix="torture-shim-") as folder:
        library, control = Path(folder, "shim.so"), Path(folder, "control")
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl", "-lpthread"]
        subprocess.run(command, check=True)
        control.write_bytes(bytes(_layout(library)[0]))
        environment = {**os.environ, _CONTROL: str(control), _LIBRARY: str(library), "LD_PRELOAD": str(library)}
        return subprocess.run([sys.executable, *arguments], env=environment).returncode


def _layout(library: Path) -> list[int]:
    places = (ctypes.c_size_t * (len(_FIELDS) + 1))()
    ctypes.CDLL(str(library)).torture_layout(places)
    return list(places)


class Shim:
    """The control block of the processes that run under the shim: this one, and all that it starts.

    Raises:
        RuntimeError: This process does not run under the shim.
    """

    def __init__(self) -> None:
        if not is_preloaded():
            raise RuntimeError("this program runs under the shim only: start it with run_preloaded")
        library = Path(os.environ[_LIBRARY])
        size, *places = _layout(library)
        self._places = dict(zip(_FIELDS, places, strict=True))
        fd = os.open(os.environ[_CONTROL], os.O_RDWR)
        self._block = mmap.mmap(fd, size)
        os.close(fd)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._block))
        ctypes.CDLL(str(library)).torture_make_lock(ctypes.c_void_p(address))

    def _set(self, field: str, value: int) -> None:
        struct.pack_into("@I", self._block, self._places[field], value)

    def _get(self, field: str) -> int:
        return int(struct.unpack_from("@I", self._block, self._places[field])[0])

    def _set_text(self, field: str, text: str) -> None:
        encoded = os.fsencode(text) + b"\0"
        start = self._places[field]
        self._block[start : start + len(encoded)] = encoded

    @property
    def seen(self) -> int:
        """How many calls were counted since the shim was armed."""
        return self._get("seen")

    @property
    def struck(self) -> int:
        """To how many calls the fault has happened."""
        return self._get("struck")

    @contextmanager
    def armed(
        self, root: Path, fault: CallFault | None = None, *, kinds: tuple[Kind, ...] = CHANGING, log: Path | None = None
    ) -> Iterator[None]:
        """Count the calls below ``root``, in all processes, and let ``fault`` happen.

        Args:
            root: A path without symbolic links.
            fault: None only counts.
            kinds: The kinds of calls that are counted.
            log: Record the calls in this file; see ``recorded``.
        """
        fault = fault or CallFault(0, Action.NOTHING)
        for field, value in (
            ("seen", 0),
            ("struck", 0),
            ("mask", sum(1 << kind for kind in kinds)),
            ("nth", fault.nth),
            ("action", fault.action),
            ("error", fault.error),
            ("lasting", fault.lasting),
            ("recording", log is not None),
        ):
            self._set(field, value)
        self._set_text("root", str(root))
        self._set_text("log", str(log or ""))
        self._set("armed", 1)
        try:
            yield
        finally:
            self._set("armed", 0)


def recorded(log: Path) -> list[Call]:
    """Return the calls in a log."""
    data, at, calls = log.read_bytes(), 0, []
    while at < len(data):
        kind, made, inode, offset, *lengths = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        parts = []
        for length in lengths:
            parts.append(data[at : at + length])
            at += length
        path, other, content = parts
        calls.append(Call(Kind(kind), bool(made), inode, offset, os.fsdecode(path), os.fsdecode(other), content))
    return calls
