"""Copies from host memory to host memory, as fast as the machine's memory, also where training keeps its cores busy.

Torch's own copy shares each tensor out to a team of threads that all have to arrive before the next tensor: on a
machine whose cores are in use, every tensor then waits for a thread that is not running. Here each thread takes the
next piece when it is done with one, whatever the others do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from dcp_plugins.format.memory import is_directly_addressable
from dcp_plugins.staging.huge_pages import huge_pages
from dcp_plugins.storage.threads import default_thread_count, run_all

__all__ = ["copy_on_host"]

# Small enough that the last pieces end together, large enough to cost nothing beside the bytes.
_PIECE_BYTES = 4 * 1024 * 1024
# Smaller tensors torch copies on the calling thread, and any number of them in one call.
_MIN_TORCH_PARALLEL_ELEMENTS = 32_768
_TENSORS_PER_CALL = 1024

_Run = tuple[int, int, int]
"""Addresses of target and source, and the number of bytes."""
_Work = list[_Run] | tuple[list[torch.Tensor], list[torch.Tensor]]
"""What a thread takes at a time: runs of bytes, or targets and sources for torch."""


def copy_on_host(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source into the target at the same place; all are strided host memory."""
    small_targets: list[torch.Tensor] = []
    small_sources: list[torch.Tensor] = []
    work: list[_Work] = []
    if sources and max(map(torch.Tensor.numel, sources)) < _MIN_TORCH_PARALLEL_ELEMENTS:
        # As very many are.
        small_targets, small_sources = list(targets), list(sources)
        targets = sources = ()
    runs: list[_Run] = []
    room = _PIECE_BYTES
    for target, source in zip(targets, sources, strict=True):
        if source.numel() < _MIN_TORCH_PARALLEL_ELEMENTS or not _same_bytes(target, source):
            small_targets.append(target)
            small_sources.append(source)
            continue
        to, start, left = target.data_ptr(), source.data_ptr(), source.nbytes
        while left:
            size = min(left, room)
            runs.append((to, start, size))
            to, start, left, room = to + size, start + size, left - size, room - size
            if not room:
                work.append(runs)
                runs, room = [], _PIECE_BYTES
    if runs:
        work.append(runs)
    for first in range(0, len(small_targets), _TENSORS_PER_CALL):
        end = first + _TENSORS_PER_CALL
        work.append((small_targets[first:end], small_sources[first:end]))
    run_all(_copy_from, [work] * min(default_thread_count(), len(work)))


@torch.no_grad()
def _copy_from(work: list[_Work]) -> None:
    """Copy what is taken from the end of a list that several threads share, until nothing is left."""
    while True:
        try:
            taken = work.pop()
        except IndexError:
            return
        # Both release the GIL.
        if isinstance(taken, tuple):
            huge_pages.make_for(taken[0])
            with torch._C.DisableTorchFunctionSubclass():
                torch._foreach_copy_(*taken)
        else:
            for to, start, size in taken:
                huge_pages.make(to, size)
                ctypes.memmove(to, start, size)


def _same_bytes(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether the elements lie in the same order, so that copying them is copying bytes."""
    return (
        target.dtype is source.dtype
        and target.shape == source.shape
        and is_directly_addressable(source)
        and is_directly_addressable(target)
    )
