"""Taking a snapshot of a state dict: same structure, same values, nothing shared with the original.

In two passes. The first finds the tensors that are plain memory, wherever they are (in containers, as the local tensor
of a DTensor, inside a wrapper), and starts their copies. The second builds the containers and wrappers anew around the
copies and deep-copies what is not a tensor, while copies from a device are still on their way.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from dcp_plugins.errors import UnsupportedValueError, listing
from dcp_plugins.staging.memory import HostMemory
from dcp_plugins.staging.wrappers import is_plain_memory, parts, rebuild
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
_PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


@torch.no_grad()
def take_snapshot(state_dict: Mapping[str, Any], memory: HostMemory, copy_all: Copy) -> dict[str, Any]:
    """Return a copy of ``state_dict`` on the host; it is complete once the copies that were started have ended.

    Tensors keep dtype, shape, placement and ``requires_grad``; parameters become plain tensors, and strided views
    become contiguous. Tensors in the same memory (tied weights, slices of a flat buffer that is itself in the state
    dict) are copied once; of a larger storage only the view is. What cannot be saved (a meta or sparse tensor) comes
    out as it is, for the save to refuse it by name.

    Args:
        state_dict: Nested dict without ``Stateful`` objects.
        memory: Where the copies go; they are valid until its next round.
        copy_all: Called once, with all tensors to copy.

    Raises:
        UnsupportedValueError: Values that cannot be copied; lists their keys.
    """
    taker = _Taker(memory)
    for key, value in state_dict.items():
        taker.collect(value, (key,))
    targets, sources = taker.place()
    copy_all(targets, sources)
    staged = {key: taker.build(value, (key,)) for key, value in state_dict.items()}
    if taker.failures:
        path, cause = taker.failures[0]
        raise UnsupportedValueError(
            f"cannot take a snapshot of {listing(_name(path) for path, _ in taker.failures)}: copying '{_name(path)}' "
            f"failed with {type(cause).__name__}: {cause}. Keep out of the state dict what copy.deepcopy cannot copy"
        ) from cause
    return staged


class _Leaf(NamedTuple):
    """A tensor that is plain memory."""

    start: int  # Address; 0 where there is none to compare.
    end: int  # Exclusive.
    tensor: torch.Tensor
    path: Path


class _Taker:
    def __init__(self, memory: HostMemory) -> None:
        self.failures: list[tuple[Path, Exception]] = []
        self._memory = memory
        self._leaves: list[_Leaf] = []
        # As copy.deepcopy's: id of an original -> its copy.
        self._memo: dict[int, Any] = {}
        self._seen: set[int] = set()
        # An id names an object only while it lives, and a mapping may make its values when asked.
        self._alive: list[Any] = []

    # -- First pass -------------------------------------------------------------------------------------------------

    def collect(self, value: Any, path: Path) -> None:
        """Find the tensors of ``value``."""
        kind = type(value)
        if kind in _PLAIN_TENSORS:
            self._add(value, path)
        elif kind in _ATOMIC or id(value) in self._seen:
            return
        elif isinstance(value, Mapping):
            self._see(value)
            for key, item in value.items():
                self.collect(item, (*path, key))
        elif isinstance(value, (list, tuple)):
            self._see(value)
            for position, item in enumerate(value):
                self.collect(item, (*path, position))
        elif isinstance(value, torch.Tensor):
            if is_plain_memory(value):
                self._add(value, path)
            else:
                for name, part in parts(value):
                    self.collect(part, (*path, name))

    def _see(self, value: Any) -> None:
        self._seen.add(id(value))
        self._alive.append(value)

    def _add(self, tensor: torch.Tensor, path: Path) -> None:
        if id(tensor) in self._seen or not is_plain_memory(tensor):
            return
        self._see(tensor)
        start = 0
        if (
            (tensor.is_cpu or tensor.is_cuda)
            and tensor.is_contiguous()
            and not tensor.is_conj()
            and not tensor.is_neg()
        ):
            start = tensor.data_ptr()
        self._leaves.append(_Leaf(start, start + tensor.nbytes, tensor, path))

    def place(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Give every tensor its place in host memory; return the targets and sources of the copies that fill them."""
        self._memory.begin_round()
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        outer: _Leaf | None = None
        outer_target: torch.Tensor | None = None
        # Outermost first: a tensor inside the one before it becomes a view of its copy.
        for leaf in sorted(self._leaves, key=_by_address):
            tensor = leaf.tensor
            if outer is not None and outer_target is not None and leaf.start and leaf.end <= outer.end:
                offset = leaf.start - outer.start
                if offset % tensor.element_size() == 0 and tensor.nbytes:
                    self._place(leaf, _window(outer_target, offset, tensor))
                    continue
            target = self._memory.take(leaf.path, tensor.shape, tensor.dtype)
            targets.append(target)
            sources.append(tensor)
            self._place(leaf, target)
            if leaf.start and (outer is None or leaf.end > outer.end):
                outer, outer_target = leaf, target
        return targets, sources

    def _place(self, leaf: _Leaf, target: torch.Tensor) -> None:
        tensor = leaf.tensor
        marked = is_checkpointable(tensor)
        if type(tensor) not in _PLAIN_TENSORS:
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
            made = self._memo[id(value)] = kind()
            if kind is collections.OrderedDict:
                # What Module.state_dict() puts there: the versions of the modules.
                made.__dict__.update(copy.deepcopy(value.__dict__, self._memo))
            for key, item in value.items():
                made[key] = self.build(item, (*path, key))
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
            if isinstance(value, torch.Tensor):
                made = rebuild(value, _name(path), lambda name, part: self.build(part, (*path, name)), self._memo)
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


def _by_address(leaf: _Leaf) -> tuple[int, int]:
    return leaf.start, -leaf.end


def _window(outer: torch.Tensor, offset_bytes: int, like: torch.Tensor) -> torch.Tensor:
    """Return the part of contiguous ``outer`` that begins at the offset, in ``like``'s dtype and shape."""
    if not offset_bytes and outer.dtype is like.dtype and outer.shape == like.shape:
        return outer
    flat = outer.view(-1).view(torch.uint8)
    return flat[offset_bytes : offset_bytes + like.nbytes].view(like.dtype).view(like.shape)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)


def _name(path: Path) -> str:
    return ".".join(map(str, path))
