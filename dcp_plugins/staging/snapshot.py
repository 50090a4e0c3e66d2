"""Taking a snapshot of a state dict: same structure, same values, nothing shared with the original.

In two passes. The first finds the tensors that are plain memory, wherever they are (in containers, as the local tensor
of a DTensor, inside a wrapper), and starts their copies. The second builds the containers and wrappers anew around the
copies and deep-copies what is not a tensor, while copies from a device are still on their way.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from dcp_plugins.collector import collector_paused
from dcp_plugins.errors import UnsupportedValueError, listing
from dcp_plugins.staging.memory import HostMemory
from dcp_plugins.staging.wrappers import PLAIN_TENSORS, copies_itself, is_plain_memory, parts, rebuild
from dcp_plugins.tensors.checkpointable import copy_attributes, is_checkpointable

__all__ = ["Copy", "take_snapshot"]

Copy = Callable[[list[torch.Tensor], list[torch.Tensor]], None]
"""Copies each source (second list, any device) into the target at the same place (first list, host memory)."""

Path = tuple[Any, ...]

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
    staged = {key: taker.build(value, (key,)) for key, value in state_dict.items()}
    if taker.failures:
        path, cause = taker.failures[0]
        raise UnsupportedValueError(
            f"cannot take a snapshot of {listing(_name(path) for path, _ in taker.failures)}: copying '{_name(path)}' "
            f"failed with {type(cause).__name__}: {cause}. Keep out of the state dict what copy.deepcopy cannot copy"
        ) from cause
    return staged


_Shape = tuple[int, int, torch.dtype, torch.Size, Path]
"""What decides where the copies of tensors that are plain memory go: address (0 where there is none to compare), bytes,
dtype, shape and path of each. A bare tuple, because there may be very many."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Layout:
    """Where the tensors of a snapshot have been placed: as long as nothing has moved, the next one's go there too."""

    shapes: list[_Shape]
    places: list[torch.Tensor]
    """For each tensor."""
    copied: list[int]
    """The tensors whose memory is in no other's, outermost first."""


_BATCH = 1024
_LOOK = operator.attrgetter("is_cpu", "layout", "is_quantized", "is_nested", "dtype", "shape")
_NBYTES = operator.attrgetter("nbytes")


def _describe_usual(tensors: list[torch.Tensor], paths: list[Path]) -> list[_Shape] | None:
    """Describe tensors that are all contiguous memory of the host, in few calls; return None if one is not."""
    on_host, layouts, quantized, nested, dtypes, shapes = zip(*map(_LOOK, tensors), strict=True)
    if (
        not all(on_host)
        or any(quantized)
        or any(nested)
        or set(layouts) != {torch.strided}
        or any(dtype.is_complex for dtype in set(dtypes))
        or not all(map(torch.Tensor.is_contiguous, tensors))
        or any(map(torch.Tensor.is_neg, tensors))
    ):
        return None
    starts = map(torch.Tensor.data_ptr, tensors)
    return list(zip(starts, map(_NBYTES, tensors), dtypes, shapes, paths, strict=True))


def _address(tensor: torch.Tensor) -> int:
    """Return where a tensor's bytes begin, or 0 if they are not contiguous memory whose elements are what it shows."""
    if not (tensor.is_cpu or tensor.is_cuda) or not tensor.is_contiguous():
        return 0
    return 0 if tensor.is_neg() or (tensor.is_complex() and tensor.is_conj()) else tensor.data_ptr()


class _Taker:
    def __init__(self, memory: HostMemory, wait: Callable[[], None], *, in_part: bool) -> None:
        self.failures: list[tuple[Path, Exception]] = []
        self._in_part = in_part
        self._memory = memory
        self._wait = wait
        # What may be plain memory, and where it was found.
        self._found: list[torch.Tensor] = []
        self._paths: list[Path] = []
        # Tensors that are plain memory.
        self._tensors: list[torch.Tensor] = []
        self._places: list[torch.Tensor] = []
        self._shapes: list[_Shape] = []
        # As copy.deepcopy's: id of an original -> its copy.
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

    def _describe(self) -> None:
        """Look at all that was found, each tensor once."""
        found, all_paths = self._found, self._paths
        if len(set(map(id, found))) < len(found):
            first: dict[int, tuple[torch.Tensor, Path]] = {}
            for tensor, path in zip(found, all_paths, strict=True):
                first.setdefault(id(tensor), (tensor, path))
            found, all_paths = [tensor for tensor, _ in first.values()], [path for _, path in first.values()]
        for start in range(0, len(found), _BATCH):
            tensors, paths = found[start : start + _BATCH], all_paths[start : start + _BATCH]
            shapes = _describe_usual(tensors, paths)
            if shapes is not None:
                self._tensors += tensors
                self._shapes += shapes
                continue
            for tensor, path in zip(tensors, paths, strict=True):
                if is_plain_memory(tensor):
                    self._tensors.append(tensor)
                    self._shapes.append((_address(tensor), tensor.nbytes, tensor.dtype, tensor.shape, path))

    def place(self, room_bytes: int | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Give every tensor its place in host memory; return the targets and sources of the copies that fill them."""
        self._describe()
        layout = self._memory.layout
        if room_bytes is not None:
            layout = self._lay_out(room_bytes)
            # Some of its places are the training's own tensors.
            self._memory.layout = None
        elif isinstance(layout, _Layout) and layout.shapes == self._shapes:
            self._memory.repeat_round()
        else:
            layout = self._memory.layout = self._lay_out(None)
        self._places = layout.places
        tensors, places = self._tensors, layout.places
        return [places[number] for number in layout.copied], [tensors[number] for number in layout.copied]

    def dress(self) -> None:
        """Make each tensor's place what it is to be in the snapshot; its bytes need not be there yet."""
        memo = self._memo
        for tensor, place in zip(self._tensors, self._places, strict=True):
            # Nearly all, of perhaps very many.
            if type(tensor) is torch.Tensor and not tensor.requires_grad and not tensor.__dict__:
                memo[id(tensor)] = place
            else:
                self._place(tensor, place)

    def _lay_out(self, room_bytes: int | None) -> _Layout:
        shapes = self._shapes
        # Number of a tensor -> number of the one around it, and its offset there in bytes.
        inside: dict[int, tuple[int, int]] = {}
        copied: list[int] = []
        outer: int | None = None
        outer_end = outer_start = 0
        # Outermost first: a tensor inside the one before it becomes a view of its copy.
        for number in sorted(range(len(shapes)), key=lambda number: (shapes[number][0], -shapes[number][1])):
            start, nbytes, dtype, _, _ = shapes[number]
            end = start + nbytes
            if outer is not None and nbytes and end <= outer_end and (start - outer_start) % dtype.itemsize == 0:
                inside[number] = outer, start - outer_start
                continue
            copied.append(number)
            if start and end > outer_end:
                outer, outer_start, outer_end = number, start, end
        memory = self._memory
        if room_bytes is not None:
            copied = _smallest(copied, [shape[1] for shape in shapes], room_bytes)
        memory.require(sum(shapes[number][1] for number in copied))
        memory.begin_round()
        places: dict[int, torch.Tensor] = {}
        try:
            for number in copied:
                _, _, dtype, shape, path = shapes[number]
                places[number] = memory.take(path, shape, dtype)
        except MemoryError:
            # Half of a snapshot is of no use, and somebody may need the memory.
            memory.close()
            raise
        memory.trim()
        for number, (outer, offset) in inside.items():
            if outer in places:
                _, nbytes, dtype, shape, _ = shapes[number]
                places[number] = _window(places[outer], offset, nbytes, dtype, shape)
        for number, tensor in enumerate(self._tensors):
            places.setdefault(number, tensor)
        return _Layout(shapes, [places[number] for number in range(len(shapes))], copied)

    def _place(self, tensor: torch.Tensor, target: torch.Tensor) -> None:
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
        if kind is dict or kind is collections.OrderedDict:
            memo = self._memo
            made = memo[id(value)] = kind()
            if kind is collections.OrderedDict:
                # What Module.state_dict() puts there: the versions of the modules.
                made.__dict__.update(copy.deepcopy(value.__dict__, self._memo))
            for key, item in value.items():
                # Most of a large state dict: what place() has made.
                place = memo.get(id(item)) if type(item) in PLAIN_TENSORS else None
                made[key] = self.build(item, (*path, key)) if place is None else place
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


def _smallest(numbers: list[int], sizes_bytes: list[int], room_bytes: int) -> list[int]:
    """Return, in their order, as many of the smallest as there is room for."""
    chosen = set()
    for number in sorted(numbers, key=lambda number: sizes_bytes[number]):
        room_bytes -= sizes_bytes[number]
        if room_bytes < 0:
            break
        chosen.add(number)
    return [number for number in numbers if number in chosen]


def _window(outer: torch.Tensor, offset: int, nbytes: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """Return the part of contiguous ``outer`` that begins at the offset in bytes."""
    if not offset and outer.dtype is dtype and outer.shape == shape:
        return outer
    flat = outer.view(-1).view(torch.uint8)
    return flat[offset : offset + nbytes].view(dtype).view(shape)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)


def _name(path: Path) -> str:
    return ".".join(map(str, path))
