"""Host memory that snapshots are copied into, kept from one to the next.

A copy into memory that has never been touched runs several times slower than into memory that has: page faults
dominate it. So what a snapshot was given, the next one with the same tensors is given again.
"""

from __future__ import annotations

import logging
import math
import mmap
import time
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

from dcp_plugins.errors import StagingMemoryError
from dcp_plugins.staging.available import available_bytes
from dcp_plugins.staging.page_locks import PageLocks
from dcp_plugins.staging.shared import SharedArena, map_shared

__all__ = ["HostMemory", "on_close"]

logger = logging.getLogger(__name__)

_ALIGNMENT_BYTES = 64
# Smaller slots share blocks, so that 20,000 small tensors are a few mappings.
_SLAB_BYTES = 8 * 1024 * 1024
_MAX_SLAB_SLOT_BYTES = 1024 * 1024
_HUGE_PAGE_BYTES = 2 * 1024 * 1024
# Clearing one takes a fifth of this.
_SLOW_HUGE_PAGE_SECONDS = 0.001
# How long to go without after a slow one: the blocks of one snapshot are asked for within less.
_PAUSE_SECONDS = 0.5
# Not worth asking the system for.
_UNCHECKED_BYTES = 64 * 1024 * 1024

_close_callbacks: list[Callable[[], None]] = []


def on_close(callback: Callable[[], None]) -> None:
    """Call ``callback`` whenever memory is closed from now on: another process may have it mapped as well."""
    _close_callbacks.append(callback)


class _Block:
    """New memory for one large slot or for many small ones."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.used_bytes = 0
        self.kept_bytes = 0
        """Of the slots in it that are kept."""

    def take(self, nbytes: int) -> torch.Tensor | None:
        """Return the next bytes of it, if there are as many left."""
        start = self.used_bytes
        if start + nbytes > self.memory.nbytes:
            return None
        self.used_bytes += _aligned(nbytes)
        return self.memory[start : start + nbytes]

    def is_mostly_empty(self) -> bool:
        return self.kept_bytes * 2 < self.used_bytes


class _Slot(NamedTuple):
    tensor: torch.Tensor
    block: _Block


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


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
        self._slab: _Block | None = None
        self.layout: object = None
        """What the last snapshot remembers of where it has placed what; kept no longer than the slots."""

    @property
    def nbytes(self) -> int:
        """Bytes in slots that are kept, used in this round or not."""
        # Asked for by anybody, while a thread that stages takes more: a list is made in one step.
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
            slot.block.kept_bytes -= _aligned(slot.tensor.nbytes)
            if not slot.block.kept_bytes:
                self._free(slot.block)

    def _free(self, block: _Block) -> None:
        if block is self._slab:
            self._slab = None
        self._locks.unlock(block.memory)
        if block.memory.is_shared():  # type: ignore[no-untyped-call]
            self._arena.discard(block.memory)

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
        """Whether a block is kept for little in it: once all of that is elsewhere, it is freed."""
        return block is not self._slab and block.is_mostly_empty()

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
        """In a forked child: what is shared is its parent's, which may be using it."""
        self._rounds = [{}, {}, {}]
        self.layout = None
        self._slab = None
        self._not_locked = []
        self._locks.forget()
        self._arena.close()

    def _allocate(self, nbytes: int) -> tuple[torch.Tensor, _Block]:
        if nbytes > _MAX_SLAB_SLOT_BYTES:
            block = self._block(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
            return block.memory[:nbytes], block
        memory = None if self._slab is None else self._slab.take(nbytes)
        if self._slab is None or memory is None:
            self._slab = self._block(_SLAB_BYTES)
            memory = self._slab.take(nbytes)
            assert memory is not None, "a new slab has room for any small slot"
        return memory, self._slab

    def _block(self, nbytes: int) -> _Block:
        is_to_be_locked = self._pinned and self._locks.are_of_use()
        block = _Block(self._new_memory(nbytes, is_to_be_locked=is_to_be_locked))
        if is_to_be_locked:
            self._not_locked.append(block)
        return block

    def _new_memory(self, nbytes: int, *, is_to_be_locked: bool) -> torch.Tensor:
        """Return new memory of whole pages."""
        if self._shared:
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
        return _anonymous_memory(nbytes, huge_pages=not is_to_be_locked)


def _anonymous_memory(nbytes: int, *, huge_pages: bool) -> torch.Tensor:
    """Map memory that goes back to the system when the last tensor in it is gone; what malloc gives it may keep.

    Args:
        huge_pages: Best for memory that this process is the first to touch. It is then private, so that a fork copies
            what changes; else forks share it.
    """
    kind = mmap.MAP_PRIVATE if huge_pages else mmap.MAP_SHARED
    try:
        mapping = mmap.mmap(-1, nbytes, flags=kind | mmap.MAP_ANONYMOUS)
    except OSError as exc:
        raise StagingMemoryError(f"could not get {nbytes} bytes of memory for staging: {exc}") from exc
    # The tensor keeps the mapping alive.
    block = torch.frombuffer(mapping, dtype=torch.uint8)
    if huge_pages and nbytes >= 2 * _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        _huge_pages.ask_for(mapping, block.data_ptr())
    return block


class _HugePages:
    """Has mappings made of huge pages, unless these are slower here.

    The first touch of memory in huge pages measured about four times faster than in small ones. But a virtual machine
    whose host takes free pages back waits for the host at each huge page that it has to ask back, while it often has
    small ones left: there it measured as much slower. One page of a mapping tells which it is.
    """

    def __init__(self) -> None:
        self._slow_until_seconds = 0.0

    def ask_for(self, mapping: mmap.mmap, address: int) -> None:
        """Ask for them, for a new mapping at this address."""
        start = time.monotonic()
        if start < self._slow_until_seconds:
            return
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            # A kernel without them.
            return
        mapping[-address % _HUGE_PAGE_BYTES] = 0
        end = time.monotonic()
        if end - start > _SLOW_HUGE_PAGE_SECONDS:
            mapping.madvise(mmap.MADV_NOHUGEPAGE)
            self._slow_until_seconds = end + _PAUSE_SECONDS


_huge_pages = _HugePages()
