"""Page-locking of host memory: copies from a CUDA device then run at the bus's full rate, and beside the host.

The memory stays what it is, ours: of exactly the size asked for, given back to the system when it is freed, and, where
it is shared, mapped by another process, which needs no CUDA for that. Torch's own allocator of locked memory rounds up
to powers of two, keeps what is freed, and cannot share. For 1.2 GB on an H100 it also takes 1.0 s, against 0.2 s here,
nearly all of it for touching the pages, and pageable memory takes four to seven times as long for each copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Sequence

import torch

from dcp_plugins.errors import StagingMemoryError
from dcp_plugins.staging.shared import libc
from dcp_plugins.storage.threads import default_thread_count, run_all

__all__ = ["PageLocks"]

_PIECE_BYTES = 32 * 1024 * 1024
# Of <sys/mman.h>; Python 3.11 does not name it.
_MADV_POPULATE_WRITE = 23
# CUDA's flag for memory that is locked for all of its contexts.
_PORTABLE = 1

_Run = tuple[int, int]
"""Address and size of whole pages."""


class PageLocks:
    """The memory that is locked for CUDA; each run of pages until ``unlock``, at the latest as long as this lives.

    A copy must not cross from one run into another: CUDA refuses it. And nothing locked may be unmapped: CUDA would
    go on taking its addresses for locked, and refuse whatever comes to lie there. So the memory is kept alive here.
    """

    def __init__(self) -> None:
        self._locked: dict[_Run, torch.Tensor] = {}
        # Not at the end of the program, which unlocks everything; CUDA may be gone by then.
        weakref.finalize(self, _unlock_all, self._locked).atexit = False

    @staticmethod
    def are_of_use() -> bool:
        """Whether this process computes on a CUDA device: locking would else take memory there, for nothing."""
        return _device_in_use() is not None

    def lock(self, blocks: Sequence[torch.Tensor]) -> None:
        """Lock blocks of whole pages.

        They have to be of memory that forks share: private pages that are locked would be copied at each fork.

        Raises:
            StagingMemoryError: CUDA refuses; some of them may be locked then.
        """
        device = _device_in_use()
        if device is None:
            raise StagingMemoryError("this process has not used a CUDA device")
        runs = [_pages_of(block) for block in blocks]
        _touch(runs)
        for run, block in zip(runs, blocks, strict=True):
            _register(run, device)
            self._locked[run] = block

    def unlock(self, block: torch.Tensor) -> None:
        """Unlock a block, if it is locked. No copy into it may be under way."""
        run = _pages_of(block)
        if run in self._locked:
            _unregister(run)
            del self._locked[run]

    def close(self) -> None:
        """Unlock everything."""
        _unlock_all(self._locked)

    def forget(self) -> None:
        """In a forked child: it has none of its parent's locks, and must not call CUDA."""
        self._locked.clear()


def _pages_of(block: torch.Tensor) -> _Run:
    return block.data_ptr(), block.nbytes


def _unlock_all(locked: dict[_Run, torch.Tensor]) -> None:
    for run in locked:
        _unregister(run)
    locked.clear()


def _touch(runs: Sequence[_Run]) -> None:
    """Have all pages made, by several threads: CUDA, which makes those that are missing, has one."""
    pieces = [
        (address + start, min(_PIECE_BYTES, nbytes - start))
        for address, nbytes in runs
        for start in range(0, nbytes, _PIECE_BYTES)
    ]

    def touch_some(left: list[_Run]) -> None:
        with contextlib.suppress(IndexError):
            while True:
                address, nbytes = left.pop()
                # Kernels before 5.14 do not know the advice, and leave it to CUDA.
                libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _MADV_POPULATE_WRITE)

    run_all(touch_some, [pieces] * min(default_thread_count(), len(pieces)))


def _device_in_use() -> int | None:
    """Return a device that has this process's context, of which locking needs one and must not make another."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    # Private, but what torch's own allocator of locked memory goes by.
    has_context = torch._C._cuda_hasPrimaryContext  # type: ignore[attr-defined]
    return next((device for device in range(torch.cuda.device_count()) if has_context(device)), None)


def _register(run: _Run, device: int) -> None:
    with torch.cuda.device(device):
        status = int(torch.cuda.cudart().cudaHostRegister(*run, _PORTABLE))  # type: ignore[no-untyped-call]
        if status:
            # CUDA keeps a refusal as this thread's last error, and the next call of torch to look for one reports it.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda")
            raise StagingMemoryError(f"CUDA's error {status}")


def _unregister(run: _Run) -> None:
    device = _device_in_use()
    if device is not None:
        with torch.cuda.device(device):
            torch.cuda.cudart().cudaHostUnregister(run[0])  # type: ignore[no-untyped-call]
