"""Memory that other processes can map: a few large memory files, each holding many slots.

One file for each tensor would cost a descriptor for each, here and in every process that maps it: 200 tensors of 6 MB
would use up the usual limit of 256. So a file is as large as address space allows, and pages are reserved only as slots
are taken from it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable

import torch

__all__ = ["SharedArena", "descriptor_of", "free_pages", "libc", "map_shared"]

_FILE_BYTES = 1024 * 1024 * 1024


class SharedArena:
    """Hands out runs of pages of shared memory, one after the other; not thread-safe.

    A file is unmapped when the arena has left it and the last tensor in it is gone. Until then ``free_pages`` gives
    back what is no longer needed.

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


def free_pages(part: torch.Tensor) -> None:
    """Free the whole pages in a part of a mapping, shared or private; whoever still reads them finds zeros."""
    start = -(-part.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (part.data_ptr() + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    is_shared = part.is_shared()  # type: ignore[no-untyped-call]
    # What frees pages of the one kind does nothing to the other.
    advice = getattr(mmap, "MADV_REMOVE" if is_shared else "MADV_DONTNEED", None)
    # A system that does not know it frees them with the mapping.
    if advice is not None and end > start:
        libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
