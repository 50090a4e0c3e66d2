"""Taking a snapshot of a state dict: same structure, same values, nothing shared with the original.

In two passes. The first finds the tensors that are plain memory, wherever they are (in containers, as the local tensor
of a DTensor, inside a wrapper), and starts their copies. The second builds the containers and wrappers anew around the
copies and deep-copies what is not a tensor, while copies from a device are still on their way.
"""

from __future__ import annotations

import collections
import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from dcp_plugins.collector import collector_paused
from dcp_plugins.errors import UnsupportedValueError, listing
from dcp_plugins.format.memory import DTYPES_WITHOUT_COPY, PLAIN_TENSORS, copyable
from dcp_plugins.staging.memory import HostMemory
from dcp_plugins.staging.placement import Path, place, shapes_of
from dcp_plugins.staging.wrappers import copies_itself, is_plain_memory, parts, rebuild
from dcp_plugins.tensors.checkpointable import copy_attributes, is_checkpointable

__all__ = ["Copy", "take_snapshot"]

Copy = Callable[[list[torch.Tensor], list[torch.Tensor]], None]
"""Copies each source (second list, any device) into the target at the same place (first list, host memory)."""

_ATOMIC = frozenset(
    {
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        torch.dtype,
        torch.device,
        torch.Size,
        torch.layout,
        torch.memory_format,
        type(...),
    }
)


@collector_paused()
@torch.no_grad()
def take_snapshot(
    state_dict: Mapping[str, Any],
    memory: HostMemory,
    copy_all: Copy,
    wait: Callable[[], None],
    *,
    room_bytes: int | None = None,
) -> dict[str, Any]:
    """Return a copy of ``state_dict`` on the host; it is complete once the copies that were started have ended.

    Tensors keep dtype, shape, placement and ``requires_grad``; parameters become plain tensors, and strided views
    become contiguous. Tensors in the same memory (tied weights, slices of a flat buffer that is itself in the state
    dict) are copied once; of a larger storage only the view is. What cannot be saved (a meta or sparse tensor) comes
    out as it is, for the save to refuse it by name.

    Args:
        state_dict: Nested dict without ``Stateful`` objects.
        memory: Where the copies go; they are valid until its next round.
        copy_all: Called once, with all tensors to copy; copies from a device may go on when it returns.
        wait: Called where copies have to be complete before the snapshot is.
        room_bytes: The most to copy: large tensors for which this leaves no room come out as the originals, and so do
            those of classes whose copies would have to be compared with them.

    Raises:
        UnsupportedValueError: Values that cannot be copied; lists their keys.
    """
    taker = _Taker(memory, wait, in_part=room_bytes is not None)
    taker.collect(state_dict, ())
    copy_all(*taker.place(room_bytes))
    taker.dress()
    staged: dict[str, Any] = taker.build(dict(state_dict), ())
    if taker.failures:
        path, cause = taker.failures[0]
        raise UnsupportedValueError(
            f"cannot take a snapshot of {listing(_name(path) for path, _ in taker.failures)}: copying '{_name(path)}' "
            f"failed with {type(cause).__name__}: {cause}. Keep out of the state dict what copy.deepcopy cannot copy"
        ) from cause
    return staged


_DICTS = frozenset({dict, collections.OrderedDict})
_dtype_of_shape = operator.itemgetter(2)
_requires_grad = operator.attrgetter("requires_grad")
_attributes = operator.attrgetter("__dict__")


class _Taker:
    def __init__(self, memory: HostMemory, wait: Callable[[], None], *, in_part: bool) -> None:
        self.failures: list[tuple[Path, Exception]] = []
        self._in_part = in_part
        self._memory = memory
        self._wait = wait
        # Tensors that may be plain memory, and their paths.
        self._found: list[torch.Tensor] = []
        self._paths: list[Path] = []
        # Tensors that are plain memory.
        self._tensors: list[torch.Tensor] = []
        self._places: list[torch.Tensor] = []
        # The memo of copy.deepcopy: id of an original -> its copy.
        self._memo: dict[int, Any] = {}
        self._seen: set[int] = set()
        # An id names an object only while it lives, and a mapping may make its values when asked.
        self._alive: list[Any] = []

    # -- First pass -------------------------------------------------------------------------------------------------

    def collect(self, value: Any, path: Path) -> None:
        """Find the tensors of ``value``."""
        kind = type(value)
        if kind in PLAIN_TENSORS:
            self._found.append(value)
            self._paths.append(path)
        elif kind in _ATOMIC or id(value) in self._seen:
            return
        elif isinstance(value, Mapping):
            self._see(value)
            found, paths = self._found, self._paths
            if kind in _DICTS and PLAIN_TENSORS.issuperset(map(type, value.values())):
                found += value.values()
                paths += [(*path, key) for key in value]
                return
            for key, item in value.items():
                if type(item) in PLAIN_TENSORS:
                    found.append(item)
                    paths.append((*path, key))
                else:
                    self.collect(item, (*path, key))
        elif isinstance(value, (list, tuple)):
            self._see(value)
            for position, item in enumerate(value):
                self.collect(item, (*path, position))
        elif isinstance(value, torch.Tensor):
            if is_plain_memory(value):
                self._found.append(value)
                self._paths.append(path)
            else:
                for name, part in parts(value):
                    self.collect(part, (*path, name))

    def _see(self, value: Any) -> None:
        self._seen.add(id(value))
        self._alive.append(value)

    def place(self, room_bytes: int | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Give every tensor its place in host memory; return the targets and sources of the copies that fill them."""
        found, all_paths = self._found, self._paths
        if len(set(map(id, found))) < len(found):
            first: dict[int, tuple[torch.Tensor, Path]] = {}
            for tensor, path in zip(found, all_paths, strict=True):
                first.setdefault(id(tensor), (tensor, path))
            found, all_paths = [tensor for tensor, _ in first.values()], [path for _, path in first.values()]
        self._tensors, shapes = shapes_of(found, all_paths)
        layout = place(self._tensors, shapes, self._memory, room_bytes)
        self._places = layout.places
        targets = [self._places[number] for number in layout.copied]
        sources = [self._tensors[number] for number in layout.copied]
        if not DTYPES_WITHOUT_COPY.isdisjoint(map(_dtype_of_shape, shapes)):
            targets, sources = list(map(copyable, targets)), list(map(copyable, sources))
        return targets, sources

    def dress(self) -> None:
        """Make each tensor's place what it is to be in the snapshot; its bytes need not be there yet."""
        tensors, places = self._tensors, self._places
        is_dressed = map(operator.or_, map(_requires_grad, tensors), map(bool, map(_attributes, tensors)))
        if {torch.Tensor}.issuperset(map(type, tensors)) and not any(is_dressed):
            self._memo.update(zip(map(id, tensors), places, strict=True))
            return
        for tensor, target in zip(tensors, places, strict=True):
            if type(tensor) is torch.Tensor and not tensor.requires_grad and not tensor.__dict__:
                self._memo[id(tensor)] = target
            else:
                self._dress(tensor, target)

    def _dress(self, tensor: torch.Tensor, target: torch.Tensor) -> None:
        marked = is_checkpointable(tensor)
        if type(tensor) not in PLAIN_TENSORS:
            target = target.as_subclass(type(tensor))
            target.__dict__.update(copy.deepcopy(tensor.__dict__, self._memo))
        elif marked or tensor.requires_grad:
            # The memory's own tensor object is given out again next time and must stay plain.
            target = target.detach()
            if is_checkpointable(tensor):
                copy_attributes(tensor, target)
        if tensor.requires_grad:
            target.requires_grad_()
        self._memo[id(tensor)] = target

    # -- Second pass ------------------------------------------------------------------------------------------------

    def build(self, value: Any, path: Path) -> Any:
        """Return the copy of ``value``, made of the tensors' copies."""
        kind = type(value)
        if kind in _ATOMIC:
            return value
        done = self._memo.get(id(value), _ABSENT)
        if done is not _ABSENT:
            return done
        if kind in _DICTS:
            memo = self._memo
            made = memo[id(value)] = kind()
            if kind is collections.OrderedDict:
                # What Module.state_dict() puts there: the versions of the modules.
                made.__dict__.update(copy.deepcopy(value.__dict__, self._memo))
            for key, item in value.items():
                # Most of a large state dict: what dress() has made.
                target = memo.get(id(item)) if type(item) in PLAIN_TENSORS else None
                made[key] = self.build(item, (*path, key)) if target is None else target
            return made
        if kind is list:
            items: list[Any] = []
            self._memo[id(value)] = items
            items.extend(self.build(item, (*path, position)) for position, item in enumerate(value))
            return items
        if kind is tuple:
            return tuple([self.build(item, (*path, position)) for position, item in enumerate(value)])
        return self._build_other(value, path)

    def _build_other(self, value: Any, path: Path) -> Any:
        made: Any
        try:
            if self._in_part and copies_itself(value):
                # What is inside may be no copy.
                made = value
            elif isinstance(value, torch.Tensor):
                made = rebuild(
                    value, _name(path), lambda name, part: self.build(part, (*path, name)), self._memo, self._wait
                )
            else:
                # Filled first, so that deepcopy finds in the memo what is inside.
                items = {key: self.build(item, (*path, key)) for key, item in _items(value)}
                made = self._deep_copy(value, items)
        # Copying runs the code of any class, which may fail in any way; all keys that do are reported together.
        except Exception as exc:
            self.failures.append((path, exc))
            return None
        self._memo[id(value)] = made
        self._alive.append(value)
        return made

    def _deep_copy(self, value: Any, items: dict[Any, Any]) -> Any:
        try:
            return copy.deepcopy(value, self._memo)
        except TypeError:
            if isinstance(value, Mapping):
                # A view of a dict, for one. A save enters any mapping, whatever its class.
                return items
            raise


_ABSENT = object()


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)


def _name(path: Path) -> str:
    return ".".join(map(str, path))
