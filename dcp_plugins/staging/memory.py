"""Host memory that snapshots are copied into, kept from one to the next.

A copy into memory that has never been touched runs several times slower than into memory that has: page faults
dominate it. So what a snapshot was given, the next one with the same tensors is given again.
"""

from __future__ import annotations

import logging
import math
import mmap
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

from dcp_plugins.errors import StagingMemoryError
from dcp_plugins.staging.available import available_bytes
from dcp_plugins.staging.huge_pages import huge_pages
from dcp_plugins.staging.page_locks import PageLocks
from dcp_plugins.staging.shared import SharedArena, free_pages, map_shared

__all__ = ["HostMemory", "on_close"]

logger = logging.getLogger(__name__)

_ALIGNMENT_BYTES = 64
# Smaller slots share blocks, so that 20,000 small tensors are a few mappings.
_SLAB_BYTES = 8 * 1024 * 1024
_MAX_SLAB_SLOT_BYTES = 1024 * 1024
# Not worth asking the system for.
_UNCHECKED_BYTES = 64 * 1024 * 1024

_close_callbacks: list[Callable[[], None]] = []


def on_close(callback: Callable[[], None]) -> None:
    """Call ``callback`` whenever memory is closed from now on: another process may have it mapped as well."""
    _close_callbacks.append(callback)


class _Block:
    """New memory for one large slot or for many small ones."""

    def __init__(self, memory: torch.Tensor, *, is_to_be_locked: bool) -> None:
        self.memory = memory
        self.is_to_be_locked = is_to_be_locked
        self.used_bytes = 0
        self.kept_bytes = 0
        """Bytes in the kept slots of this block."""

        # Slots of shared memory are views: another process maps a block by its one storage. Each slot of private memory
        # has its own storage: `torch.save` writes whole storages, and refuses tensors of two dtypes in one storage.
        self._bytes = memory if memory.is_shared() else memory.numpy()  # type: ignore[no-untyped-call]

    def take(self, nbytes: int) -> torch.Tensor | None:
        """Return the next ``nbytes`` bytes of the block; None if fewer are left."""
        start = self.used_bytes
        if start + nbytes > self.memory.nbytes:
            return None
        self.used_bytes += _aligned(nbytes)
        return self.part(start, start + nbytes)

    def part(self, start: int, stop: int) -> torch.Tensor:
        """Return the bytes from ``start`` to ``stop`` (exclusive). They keep the whole block in memory."""
        part = self._bytes[start:stop]
        return part if isinstance(part, torch.Tensor) else torch.from_numpy(part)


class _Slot(NamedTuple):
    tensor: torch.Tensor
    block: _Block


def _aligned(nbytes: int) -> int:
    # An empty tensor takes some too, so that its block is seen to be in use.
    return -(-max(nbytes, 1) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


class HostMemory:
    """Host tensors by key: the same key, type and shape give the same memory in the next round.

    A round is one snapshot. A slot is kept while it was used in this round or one of the two before, so that two state
    dicts staged in turn keep theirs, and what no longer exists is freed. Not thread-safe.

    Args:
        pinned: Page-locked by ``lock_pages``, for copies from a CUDA device at full rate, once this process uses one.
        shared: Memory that other processes can map through ``torch.multiprocessing`` without a copy.
        max_bytes: The most to take and keep; None leaves it at what the machine has.
        times_needed: How many times the bytes of a round the machine has to have, because others take as much.
    """

    def __init__(
        self, *, pinned: bool = False, shared: bool = False, max_bytes: int | None = None, times_needed: int = 1
    ) -> None:
        self._times_needed = times_needed
        self._pinned = pinned
        self._max_bytes = max_bytes
        self._shared = shared
        self._arena = SharedArena(map_shared)
        self._locks = PageLocks()
        self._not_locked: list[_Block] = []
        self._rounds: list[dict[Hashable, _Slot]] = [{}, {}, {}]
        # The blocks of small slots; the last one may have room.
        self._slabs: list[_Block] = []
        self.layout: object = None
        """The places of the last snapshot's tensors, for the next snapshot; dropped with the slots."""

    @property
    def nbytes(self) -> int:
        """Bytes in slots that are kept, used in this round or not."""
        # Any thread may ask while a staging thread adds slots: list() copies the values in one step.
        return sum(slot.tensor.nbytes for slots in self._rounds for slot in list(slots.values()))

    def require(self, nbytes: int) -> None:
        """Raise ``StagingMemoryError`` unless there is room for a round of this many bytes in all.

        Memory is not taken before it is touched: without this the system would end the process in the midst of a copy.
        """
        if self._max_bytes is not None and nbytes > self._max_bytes:
            raise StagingMemoryError(f"a snapshot takes {nbytes} bytes, and max_staging_bytes allows {self._max_bytes}")
        missing = nbytes * self._times_needed - self.nbytes
        available = available_bytes() if missing > _UNCHECKED_BYTES else None
        if available is not None and missing > available:
            raise StagingMemoryError(
                f"a snapshot takes {missing} bytes more than are kept for it, and {available} are available here"
            )

    def room_bytes(self) -> int:
        """Return how large a round may be, of what is allowed and of three quarters of what the machine has left."""
        available = available_bytes()
        room = self._max_bytes
        if available is not None:
            usable = self.nbytes + available * 3 // 4
            room = usable if room is None else min(room, usable)
        return 0 if room is None else room

    def storages(self) -> frozenset[int]:
        """Return the addresses of the storages that this round's slots are in."""
        return frozenset(slot.tensor.untyped_storage().data_ptr() for slot in self._rounds[0].values())

    def trim(self) -> None:
        """Let go of what earlier rounds have used and this one has not, where all together is more than is allowed."""
        while self._max_bytes is not None and self.nbytes > self._max_bytes and any(self._rounds[1:]):
            self._rotate([self._rounds[0], {}, self._rounds[1]])

    def begin_round(self) -> None:
        """Begin a new snapshot; what the one before was given is given out again, so it is no longer valid."""
        self._rotate([{}, *self._rounds[:2]])

    def _rotate(self, rounds: list[dict[Hashable, _Slot]]) -> None:
        dropped = self._rounds[2]
        self._rounds = rounds
        for slot in dropped.values():
            block = slot.block
            block.kept_bytes -= _aligned(slot.tensor.nbytes)
            if not block.kept_bytes:
                self._free(block)
            elif not block.is_to_be_locked:
                free_pages(slot.tensor)

    def _free(self, block: _Block) -> None:
        if block in self._slabs:
            self._slabs.remove(block)
        self._locks.unlock(block.memory)
        huge_pages.forget(block.memory)
        if block.memory.is_shared():  # type: ignore[no-untyped-call]
            free_pages(block.memory)

    def is_sparse(self) -> bool:
        """Whether blocks are kept for little in them, so that it is worth placing the next round anew."""
        return any(map(self._is_to_be_left, self._slabs))

    def repeat_round(self) -> None:
        """Begin a new snapshot that is given all that the one before was given."""
        slots = self._rounds[0]
        self.begin_round()
        self._rounds[:2] = [slots, {}]

    def take(self, path: Hashable, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return the contiguous tensor kept for this key, or a new, uninitialised one."""
        key = (path, shape, dtype)
        current, *earlier = self._rounds
        for slots in earlier:
            slot = slots.get(key)
            if slot is not None and not self._is_to_be_left(slot.block):
                del slots[key]
                break
        else:
            nbytes = math.prod(shape) * dtype.itemsize
            memory, block = self._allocate(nbytes)
            block.kept_bytes += _aligned(nbytes)
            slot = _Slot(memory.view(dtype).view(shape), block)
        current[key] = slot
        return slot.tensor

    def _is_to_be_left(self, block: _Block) -> bool:
        """Whether little is left in a block: once all of that is elsewhere, it is freed."""
        return block.kept_bytes * 2 < block.used_bytes and block is not self._slabs[-1]

    def lock_pages(self) -> None:
        """Lock what was taken since the last time, where page-locked memory was asked for and is of use."""
        if not self._not_locked:
            return
        blocks = [block.memory for block in self._not_locked if block.kept_bytes]
        self._not_locked = []
        try:
            self._locks.lock(blocks)
        except StagingMemoryError as exc:
            self._pinned = False
            nbytes = sum(block.nbytes for block in blocks)
            logger.warning("could not pin %d bytes for staging (%s): going on with pageable memory", nbytes, exc)

    def close(self) -> None:
        """Forget all slots: their memory is freed when the last tensor in it is gone."""
        self._locks.close()
        self.forget()
        for callback in _close_callbacks:
            callback()

    def forget(self) -> None:
        """Let go of all without touching it: in a forked child it is the parent's."""
        for slots in self._rounds:
            for slot in slots.values():
                huge_pages.forget(slot.block.memory)
        self._rounds = [{}, {}, {}]
        self.layout = None
        self._slabs = []
        self._not_locked = []
        self._locks.forget()
        self._arena.close()

    def _allocate(self, nbytes: int) -> tuple[torch.Tensor, _Block]:
        if nbytes > _MAX_SLAB_SLOT_BYTES:
            block = self._block(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE, is_for_one=True)
            return block.part(0, nbytes), block
        memory = self._slabs[-1].take(nbytes) if self._slabs else None
        if memory is None:
            self._slabs.append(self._block(_SLAB_BYTES, is_for_one=False))
            memory = self._slabs[-1].take(nbytes)
            assert memory is not None, "a new slab has room for any small slot"
        return memory, self._slabs[-1]

    def _block(self, nbytes: int, *, is_for_one: bool) -> _Block:
        """Return new memory of whole pages."""
        is_to_be_locked = self._pinned and self._locks.are_of_use()
        memory = self._shared_memory(nbytes)
        if memory is None and is_to_be_locked:
            # Forks share it: see PageLocks.
            memory = _anonymous_memory(nbytes, mmap.MAP_SHARED)
        elif memory is None:
            # With one small page at the end, which may be touched before the others.
            memory = _anonymous_memory(nbytes + mmap.PAGESIZE, mmap.MAP_PRIVATE)
            if is_for_one:
                huge_pages.expect(memory)
        block = _Block(memory, is_to_be_locked=is_to_be_locked)
        if is_to_be_locked:
            self._not_locked.append(block)
        return block

    def _shared_memory(self, nbytes: int) -> torch.Tensor | None:
        if not self._shared:
            return None
        try:
            return self._arena.take(nbytes)
        except OSError as exc:
            self._shared = False
            logger.warning(
                "could not get %d bytes of shared memory for staging (%s): going on with private memory, which is "
                "copied once more on its way to another process",
                nbytes,
                exc,
            )
            return None


def _anonymous_memory(nbytes: int, kind: int) -> torch.Tensor:
    """Map memory that goes back to the system when the last tensor in it is gone; what malloc gives it may keep."""
    try:
        mapping = mmap.mmap(-1, nbytes, flags=kind | mmap.MAP_ANONYMOUS)
    except OSError as exc:
        raise StagingMemoryError(f"could not get {nbytes} bytes of memory for staging: {exc}") from exc
    # The tensor keeps the mapping alive.
    return torch.frombuffer(mapping, dtype=torch.uint8)
