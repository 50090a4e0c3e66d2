"""A model of a disk: of the calls that a process made, which changes survive a loss of power is a free choice.

What POSIX promises is all that is kept: what was written into a file survives once the file was synced; a name, new,
renamed or deleted, survives once its directory was synced. Until then any part of it may be on the disk, in any order;
a rename is done wholly or not at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture.shim import Call, Kind

__all__ = ["Choice", "Disk"]


@dataclass(eq=False)
class _File:
    safe: bytes = b""
    """What has been synced."""
    writes: list[tuple[int, bytes | None]] = field(default_factory=list)
    """What was written since: offset and bytes; None cuts the file there."""


@dataclass(eq=False)
class _Link:
    target: str


@dataclass(eq=False)
class _Directory:
    names: dict[str, _Node] = field(default_factory=dict)
    """As processes see them."""
    safe: dict[str, _Node] = field(default_factory=dict)


_Node = _File | _Link | _Directory


@dataclass(eq=False)
class _Change:
    """A change of names that is not yet safe."""

    sets: list[tuple[_Directory, str, _Node]]
    removes: list[tuple[_Directory, str, _Node]]

    @property
    def where(self) -> set[int]:
        return {id(directory) for directory, _, _ in (*self.sets, *self.removes)}


@dataclass(frozen=True)
class Choice:
    """What survives of that which was not synced.

    Attributes:
        name: For messages.
        change: Whether a change of names is on the disk; asked for each in turn.
        write: What of a file's writes is on the disk: "all", "none", "half" of the bytes, "zeros" in their place, or
            "some" of the writes.
    """

    name: str
    change: Callable[[], bool]
    write: Callable[[], str]
    random: random.Random


class Disk:
    """A directory tree to which recorded calls are applied.

    Args:
        base: A directory whose present contents are on the disk, safely.
    """

    def __init__(self, base: Path) -> None:
        self._root = _Directory()
        self._files: dict[int, _Node] = {}
        self._pending: list[_Change] = []
        self._read(base, self._root)

    def _read(self, path: Path, directory: _Directory) -> None:
        self._files[path.stat().st_ino] = directory
        for entry in path.iterdir():
            node: _Node
            if entry.is_symlink():
                node = _Link(str(entry.readlink()))
            elif entry.is_dir():
                node = _Directory()
                self._read(entry, node)
            else:
                node = self._files.setdefault(entry.stat().st_ino, _File(entry.read_bytes()))
            directory.names[entry.name] = directory.safe[entry.name] = node

    def apply(self, call: Call) -> None:
        """Apply one call."""
        match call.kind:
            case Kind.CREATE:
                if call.made:
                    self._files[call.inode] = made = _File()
                    self._change(sets=[(*self._place(call.path), made)])
            case Kind.WRITE:
                self._file(call).writes.append((call.offset, call.data))
            case Kind.TRUNCATE:
                self._file(call).writes.append((call.offset, None))
            case Kind.SYNC:
                file = self._file(call)
                file.safe, file.writes = _applied(file.safe, file.writes), []
            case Kind.DIRSYNC:
                directory = self._files[call.inode]
                assert isinstance(directory, _Directory)
                self._sync(directory)
            case Kind.MKDIR:
                new = _Directory()
                self._files[call.inode] = new
                self._change(sets=[(*self._place(call.path), new)])
            case Kind.UNLINK | Kind.RMDIR:
                directory, name = self._place(call.path)
                self._change(removes=[(directory, name, directory.names[name])])
            case Kind.RENAME:
                (source, old), (target, new_name) = self._place(call.path), self._place(call.other)
                node = source.names[old]
                self._change(sets=[(target, new_name, node)], removes=[(source, old, node)])
            case Kind.LINK:
                target, new_name = self._place(call.other)
                if call.path:
                    source, old = self._place(call.path)
                    self._change(sets=[(target, new_name, source.names[old])])
                else:
                    self._change(sets=[(target, new_name, _Link(call.data.decode()))])
            case _:
                raise AssertionError(f"not a change: {call.kind}")

    def _file(self, call: Call) -> _File:
        found = self._files[call.inode]
        assert isinstance(found, _File)
        return found

    def _place(self, path: str) -> tuple[_Directory, str]:
        *parents, name = path.split("/")
        directory = self._root
        for parent in parents:
            found = directory.names[parent]
            assert isinstance(found, _Directory)
            directory = found
        return directory, name

    def _change(
        self,
        sets: list[tuple[_Directory, str, _Node]] | None = None,
        removes: list[tuple[_Directory, str, _Node]] | None = None,
    ) -> None:
        change = _Change(sets or [], removes or [])
        for directory, name, _ in change.removes:
            del directory.names[name]
        for directory, name, node in change.sets:
            directory.names[name] = node
        self._pending.append(change)

    def _sync(self, directory: _Directory) -> None:
        for change in [change for change in self._pending if id(directory) in change.where]:
            _keep(change)
            self._pending.remove(change)

    def write(self, choice: Choice, target: Path) -> None:
        """Write the tree that is on the disk after a loss of power now into an empty directory."""
        saved: dict[int, dict[str, _Node]] = {}
        for change in self._pending:
            for directory, _, _ in (*change.sets, *change.removes):
                saved.setdefault(id(directory), dict(directory.safe))
        directories = {id(node): node for node in (self._root, *self._files.values()) if isinstance(node, _Directory)}
        for change in self._pending:
            if choice.change():
                _keep(change)
        self._write(self._root, target, choice, {})
        for key, safe in saved.items():
            directories[key].safe = safe

    def _write(self, directory: _Directory, target: Path, choice: Choice, written: dict[int, Path]) -> None:
        for name, node in directory.safe.items():
            path = target / name
            if isinstance(node, _Directory):
                path.mkdir()
                self._write(node, path, choice, written)
            elif isinstance(node, _Link):
                path.symlink_to(node.target)
            elif id(node) in written:
                path.hardlink_to(written[id(node)])
            else:
                path.write_bytes(_survived(node, choice))
                written[id(node)] = path


def _keep(change: _Change) -> None:
    for directory, name, node in change.removes:
        if directory.safe.get(name) is node:
            del directory.safe[name]
    for directory, name, node in change.sets:
        directory.safe[name] = node


def _applied(content: bytes, writes: list[tuple[int, bytes | None]]) -> bytes:
    changed = bytearray(content)
    for offset, data in writes:
        if data is None:
            del changed[offset:]
            changed.extend(bytes(offset - len(changed)))
        else:
            changed.extend(bytes(max(0, offset - len(changed))))
            changed[offset : offset + len(data)] = data
    return bytes(changed)


def _survived(file: _File, choice: Choice) -> bytes:
    if not file.writes:
        return file.safe
    whole = _applied(file.safe, file.writes)
    match choice.write():
        case "all":
            return whole
        case "none":
            return file.safe
        case "half":
            return whole[: len(whole) // 2]
        case "zeros":
            return bytes(len(whole))
        case "some":
            return _applied(file.safe, [write for write in file.writes if choice.random.random() < 0.5])
        case other:
            raise AssertionError(other)
