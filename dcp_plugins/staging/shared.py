"""Memory that other processes can map: a few large memory files, each holding many slots.

One file for each tensor would cost a descriptor for each, here and in every process that maps it: 200 tensors of 6 MB
would use up the usual limit of 256. So a file is as large as address space allows, and pages are reserved only as slots
are taken from it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

import torch

__all__ = ["SharedArena", "descriptor_of", "libc", "map_shared"]

_FILE_BYTES = 1024 * 1024 * 1024
# fallocate(2): free the range's pages, and leave the file's size as it is.
_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02


class SharedArena:
    """Hands out runs of pages of shared memory, one after the other; not thread-safe.

    A file is unmapped when the arena has left it and the last tensor in it is gone. Until then the pages of what was
    discarded go back to the system on their own.

    Args:
        new_file: Maps a file of the given size, without reserving its memory.
    """

    def __init__(self, new_file: Callable[[int], torch.Tensor]) -> None:
        self._new_file = new_file
        self._file: torch.Tensor | None = None
        self._used_bytes = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """Return ``nbytes``, whole pages, that can be written without a fault.

        Raises:
            OSError: There is not that much shared memory.
        """
        if self._file is None or self._used_bytes + nbytes > self._file.numel():
            self._file = self._new_file(max(nbytes, _FILE_BYTES))
            self._used_bytes = 0
        start = self._used_bytes
        _reserve(self._file, start, nbytes)
        self._used_bytes += nbytes
        return self._file[start : start + nbytes]

    def discard(self, pages: torch.Tensor) -> None:
        """Free what ``take`` gave; whoever still reads it finds zeros."""
        # A hint: where the system does not know the call, the file's end frees the pages.
        descriptor = descriptor_of(pages.untyped_storage())
        _fallocate(descriptor, _KEEP_SIZE_PUNCH_HOLE, int(pages.storage_offset()), pages.nbytes)

    def close(self) -> None:
        """Leave the last file."""
        self._file = None


def map_shared(nbytes: int) -> torch.Tensor:
    """Map a new memory file, whose pages are not reserved yet, as a tensor of bytes.

    Unlike a file in /dev/shm it is not bound by that file system's size, which in containers is small.
    """
    try:
        if not hasattr(os, "memfd_create"):
            return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(nbytes))  # type: ignore[no-untyped-call]
        descriptor = os.memfd_create("dcp_staging")
        try:
            os.ftruncate(descriptor, nbytes)
            # Private, but what torch.multiprocessing itself makes a storage from a received descriptor with. The
            # storage has a duplicate of the descriptor.
            storage = torch.UntypedStorage._new_shared_fd_cpu(descriptor, nbytes)  # type: ignore[attr-defined]
        finally:
            os.close(descriptor)
    except RuntimeError as exc:
        # How torch says that mmap failed.
        raise OSError(f"cannot map {nbytes} bytes of shared memory: {exc}") from exc
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def descriptor_of(storage: torch.UntypedStorage) -> int:
    """Return the descriptor of a shared storage's file; it is the storage's own, and not to be closed."""
    return int(storage._share_fd_cpu_()[0])


def _reserve(file: torch.Tensor, offset_bytes: int, nbytes: int) -> None:
    """Have pages set aside now: a shortage is an OSError here instead of a SIGBUS at the first touch."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor_of(file.untyped_storage()), offset_bytes, nbytes)


@functools.cache
def libc() -> ctypes.CDLL:
    """Return the C library, for calls to the system that Python does not have; they release the GIL."""
    return ctypes.CDLL(None)


def _fallocate(descriptor: int, mode: int, offset_bytes: int, nbytes: int) -> None:
    call = getattr(libc(), "fallocate64", None)
    if call is not None:
        call(descriptor, mode, ctypes.c_int64(offset_bytes), ctypes.c_int64(nbytes))
