"""Host memory that snapshots are copied into, kept from one to the next.

A copy into memory that has never been touched runs several times slower than into memory that has: page faults
dominate it. So what a snapshot was given, the next one with the same tensors is given again.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
from collections.abc import Hashable

import torch

__all__ = ["HostMemory"]

logger = logging.getLogger(__name__)

_ALIGNMENT_BYTES = 64
# Smaller slots share blocks, so that 20,000 small tensors are a few mappings (and, shared, a few descriptors).
_SLAB_BYTES = 8 * 1024 * 1024
_MAX_SLAB_SLOT_BYTES = 1024 * 1024


class HostMemory:
    """Host tensors by key: the same key, type and shape give the same memory in the next round.

    A round is one snapshot. A slot is kept while it was used in this round or one of the two before, so that two state
    dicts staged in turn keep theirs, and what no longer exists is freed. Not thread-safe.

    Args:
        pinned: Page-locked, for copies from a CUDA device at full rate. Torch's allocator for pinned memory rounds
            large tensors up to a power of two, and keeps for reuse what is freed.
        shared: Memory that other processes can map through ``torch.multiprocessing`` without a copy. Ignored where
            ``pinned`` is given: page-locked memory is this process's own.
    """

    def __init__(self, *, pinned: bool = False, shared: bool = False) -> None:
        self._pinned = pinned
        self._shared = shared and not pinned
        self._rounds: list[dict[Hashable, torch.Tensor]] = [{}, {}, {}]
        self._slab: torch.Tensor | None = None
        self._slab_used_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes in slots that are kept, used in this round or not."""
        return sum(slot.nbytes for slots in self._rounds for slot in slots.values())

    def begin_round(self) -> None:
        """Begin a new snapshot; what the one before was given is given out again, so it is no longer valid."""
        self._rounds = [{}, *self._rounds[:2]]

    def take(self, path: Hashable, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return the contiguous tensor kept for this key, or a new, uninitialised one."""
        key = (path, shape, dtype)
        current, previous, older = self._rounds
        slot = previous.pop(key, None)
        if slot is None:
            slot = older.pop(key, None)
            if slot is None:
                slot = self._allocate(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
        current[key] = slot
        return slot

    def close(self) -> None:
        """Forget all slots: their memory is freed when the last tensor in it is gone."""
        self._rounds = [{}, {}, {}]
        self._slab = None

    def _allocate(self, nbytes: int) -> torch.Tensor:
        if nbytes > _MAX_SLAB_SLOT_BYTES:
            return self._block(nbytes)[:nbytes]
        if self._slab is None or self._slab_used_bytes + nbytes > self._slab.numel():
            self._slab = self._block(_SLAB_BYTES)
            self._slab_used_bytes = 0
        start = self._slab_used_bytes
        self._slab_used_bytes += -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return self._slab[start : start + nbytes]

    def _block(self, nbytes: int) -> torch.Tensor:
        """Return at least ``nbytes`` of new memory, of the best kind that is to be had."""
        if self._pinned:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as exc:
                self._pinned = False
                logger.warning("could not pin %d bytes for staging (%s): going on with pageable memory", nbytes, exc)
        if self._shared:
            try:
                return _shared_block(nbytes)
            except OSError as exc:
                self._shared = False
                logger.warning(
                    "could not get %d bytes of shared memory for staging (%s): going on with private memory, which is "
                    "copied once more on its way to another process",
                    nbytes,
                    exc,
                )
        return _private_block(nbytes)


def _private_block(nbytes: int) -> torch.Tensor:
    """Map anonymous memory, which goes back to the system when the last tensor in it is gone; malloc may keep it.

    Huge pages are not asked for: on virtual machines whose host takes free pages back, the first touch of a huge page
    measured up to four times slower than that of as many small ones, and after the first touch there is no difference.
    """
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # The tensor keeps the mapping alive.
    return torch.frombuffer(mapping, dtype=torch.uint8)


def _shared_block(nbytes: int) -> torch.Tensor:
    """Map a memory file that torch.multiprocessing can hand to other processes by its descriptor.

    Unlike a file in /dev/shm it is not bound by that file system's size, which in containers is small, and reserving
    it here turns a shortage into an OSError instead of a SIGBUS at the first touch.
    """
    if not hasattr(os, "memfd_create"):
        return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(nbytes))  # type: ignore[no-untyped-call]
    descriptor = os.memfd_create("dcp_staging")
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        # Private, but what torch.multiprocessing itself makes a storage from a received descriptor with. The storage
        # has a duplicate of the descriptor.
        storage = torch.UntypedStorage._new_shared_fd_cpu(descriptor, nbytes)  # type: ignore[attr-defined]
    finally:
        os.close(descriptor)
    return torch.empty(0, dtype=torch.uint8).set_(storage)
