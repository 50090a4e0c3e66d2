"""Where the tensors of a snapshot go in host memory: each once, and where its last copy was."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch

from dcp_plugins.errors import UnsupportedValueError
from dcp_plugins.format.memory import addresses_of
from dcp_plugins.staging.memory import HostMemory
from dcp_plugins.staging.wrappers import is_plain_memory

__all__ = ["Layout", "Path", "place", "shapes_of", "stand_for_originals"]

Path = tuple[Any, ...]

Shape = tuple[int, int, torch.dtype, torch.Size, Path]
"""What decides where the copy of a tensor goes: its address (0 where there is none to compare), bytes, dtype, shape and
path. A bare tuple, because there may be very many."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Nesting:
    """Which tensors' memory lies in that of others."""

    inside: dict[int, tuple[int, int]]
    """Number of a tensor -> number of the one around it, and its offset there in bytes."""
    copied: list[int]
    """The tensors whose memory is in no other's, by address."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Where tensors have been placed: the next ones go there too, if they are the same, wherever they are now."""

    shapes: list[Shape]
    nesting: _Nesting
    places: list[torch.Tensor]
    """For each tensor."""

    @property
    def copied(self) -> list[int]:
        """The numbers of the tensors to copy; the others' copies are in these."""
        return self.nesting.copied

    def is_for(self, shapes: list[Shape], nesting: _Nesting) -> bool:
        """Whether there is such a place for each of these tensors."""
        return (
            len(shapes) == len(self.shapes)
            and nesting.inside == self.nesting.inside
            and list(map(_all_but_address, shapes)) == list(map(_all_but_address, self.shapes))
        )


_BATCH = 1024
_look = operator.attrgetter("nbytes", "dtype", "shape")
_all_but_address = operator.itemgetter(slice(1, None))


def shapes_of(found: Sequence[torch.Tensor], paths: Sequence[Path]) -> tuple[list[torch.Tensor], list[Shape]]:
    """Look at tensors, and return those that are plain memory, with their shapes."""
    tensors: list[torch.Tensor] = []
    shapes: list[Shape] = []
    for start in range(0, len(found), _BATCH):
        batch = found[start : start + _BATCH]
        batch_paths = paths[start : start + _BATCH]
        addresses = addresses_of(batch)
        if addresses is not None:
            # As nearly all are, where there are very many: in few calls.
            sizes_bytes, dtypes, sizes = zip(*map(_look, batch), strict=True)
            tensors += batch
            shapes += zip(addresses, sizes_bytes, dtypes, sizes, batch_paths, strict=True)
            continue
        for tensor, path in zip(batch, batch_paths, strict=True):
            if is_plain_memory(tensor):
                if tensor.numel() and not tensor.untyped_storage().nbytes():
                    # Copying from it ends the process.
                    raise UnsupportedValueError(
                        f"{'.'.join(map(str, path))}: the tensor has no memory: its storage has been freed, as FSDP "
                        "does between uses; save what get_model_state_dict returns"
                    )
                tensors.append(tensor)
                shapes.append((_address(tensor), tensor.nbytes, tensor.dtype, tensor.shape, path))
    return tensors, shapes


def _address(tensor: torch.Tensor) -> int:
    """Return where a tensor's bytes begin, or 0 if they are not contiguous memory whose elements are what it shows."""
    if not (tensor.is_cpu or tensor.is_cuda) or not tensor.is_contiguous():
        return 0
    return 0 if tensor.is_neg() or (tensor.is_complex() and tensor.is_conj()) else tensor.data_ptr()


def place(tensors: Sequence[torch.Tensor], shapes: list[Shape], memory: HostMemory, room_bytes: int | None) -> Layout:
    """Begin a round of ``memory``, and give each tensor its place in it.

    Args:
        room_bytes: The most to take: large tensors for which this leaves no room are their own places.
    """
    if room_bytes is not None:
        # Some of its places are the training's own tensors.
        memory.layout = None
        return _lay_out(tensors, shapes, _nesting(shapes), memory, room_bytes)
    layout = memory.layout if isinstance(memory.layout, Layout) and not memory.is_sparse() else None
    if layout is None or layout.shapes != shapes:
        nesting = _nesting(shapes)
        if layout is None or not layout.is_for(shapes, nesting):
            memory.layout = layout = _lay_out(tensors, shapes, nesting, memory, None)
            return layout
        memory.layout = layout = Layout(shapes, layout.nesting, layout.places)
    memory.repeat_round()
    return layout


def stand_for_originals(memory: HostMemory, first: HostMemory) -> None:
    """Have the snapshot in ``memory``, which was taken of the one in ``first``, count as one of what that was taken of.

    The next one of the same tensors is then found to have its places, without a look at what lies in what.
    """
    layout, original = memory.layout, first.layout
    if isinstance(layout, Layout) and isinstance(original, Layout) and layout.is_for(original.shapes, original.nesting):
        memory.layout = Layout(original.shapes, layout.nesting, layout.places)


def _lay_out(
    tensors: Sequence[torch.Tensor],
    shapes: list[Shape],
    nesting: _Nesting,
    memory: HostMemory,
    room_bytes: int | None,
) -> Layout:
    copied = nesting.copied
    if room_bytes is not None:
        copied = _smallest(copied, [shape[1] for shape in shapes], room_bytes)
    memory.require(sum(shapes[number][1] for number in copied))
    # If this is interrupted, what was known of the last round holds no more.
    memory.layout = None
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
    memory.lock_pages()
    for number, (outer, offset) in nesting.inside.items():
        if outer in places:
            _, nbytes, dtype, shape, _ = shapes[number]
            places[number] = _window(places[outer], offset, nbytes, dtype, shape)
    for number, tensor in enumerate(tensors):
        places.setdefault(number, tensor)
    nesting = dataclasses.replace(nesting, copied=copied)
    return Layout(shapes, nesting, [places[number] for number in range(len(shapes))])


def _nesting(shapes: list[Shape]) -> _Nesting:
    inside: dict[int, tuple[int, int]] = {}
    copied: list[int] = []
    outer: int | None = None
    outer_end = outer_start = 0
    # Outermost first: a tensor inside the one before it becomes a view of its copy.
    keys = [(shape[0], -shape[1]) for shape in shapes]
    for number in sorted(range(len(shapes)), key=keys.__getitem__):
        start, nbytes, dtype, _, _ = shapes[number]
        end = start + nbytes
        if outer is not None and nbytes and end <= outer_end and (start - outer_start) % dtype.itemsize == 0:
            inside[number] = outer, start - outer_start
            continue
        copied.append(number)
        if start and end > outer_end:
            outer, outer_start, outer_end = number, start, end
    return _Nesting(inside, copied)


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
