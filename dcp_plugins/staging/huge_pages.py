"""Huge pages for memory that is about to be touched for the first time, as long as they are the faster ones.

The first touch of memory in huge pages measured about four times faster than in small ones. But a virtual machine whose
host takes free pages back waits for the host at each huge page that it has to ask back, twenty times as long, while it
often has small ones left. Which of them come fast is not known before, and changes in the midst of a snapshot: so each
is timed, and as soon as they do not pay the rest of the snapshot's memory is left to small pages.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Sequence

import torch

from dcp_plugins.staging.shared import libc

__all__ = ["HugePages", "huge_pages"]

_PAGE_BYTES = 2 * 1024 * 1024
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)
# What as much memory takes in small pages. A fast page takes 0.25 ms, a slow one 5 ms.
_SMALL_PAGES_SECONDS = 0.0008
# How much may be lost by trying.
_CREDIT_SECONDS = 0.02


class HugePages:
    """The pages that new memory could be made of; for all threads that write to it first."""

    def __init__(self) -> None:
        # The addresses of whole pages in memory that nobody has touched yet.
        self._untouched: set[int] = set()
        self._credit_seconds = _CREDIT_SECONDS

    def expect(self, memory: torch.Tensor) -> None:
        """Have new, private memory made of them as far as ``make`` is called for it; its last byte is written to."""
        if _ADVICE is not None:
            if not self._untouched:
                # Another snapshot: other pages may be free by now.
                self._credit_seconds = _CREDIT_SECONDS
            # The kernel rejoins parts of a mapping that have had different advice only if they were touched as one
            # before: else every few megabytes stay a mapping of their own, of which a process may have 65,530.
            ctypes.memset(memory.data_ptr() + memory.nbytes - 1, 0, 1)
            self._untouched.update(_whole_pages(memory))

    def make(self, address: int, nbytes: int) -> None:
        """Make the pages of a run of memory that is about to be overwritten, and may be new."""
        if not self._untouched:
            return
        for page in range(address // _PAGE_BYTES * _PAGE_BYTES, address + nbytes, _PAGE_BYTES):
            if page not in self._untouched:
                continue
            self._untouched.discard(page)
            if self._credit_seconds > 0:
                # Nothing outside of the run is touched: what was freed before it was made may be anything now.
                self._credit_seconds += _SMALL_PAGES_SECONDS - self._seconds_to_make(page, max(page, address))

    def make_for(self, targets: Sequence[torch.Tensor]) -> None:
        """Make the pages of tensors that are about to be overwritten."""
        if self._untouched:
            for target in targets:
                self.make(target.data_ptr(), target.nbytes)

    def forget(self, memory: torch.Tensor) -> None:
        """Expect nothing more of memory that is let go of."""
        if self._untouched:
            self._untouched.difference_update(_whole_pages(memory))

    @staticmethod
    def _seconds_to_make(page: int, byte: int) -> float:
        """Touch a byte of a page; return what that took on the processor, without waiting for the interpreter."""
        libc().madvise(ctypes.c_void_p(page), ctypes.c_size_t(_PAGE_BYTES), _ADVICE)
        start = time.thread_time()
        ctypes.memset(byte, 0, 1)
        return time.thread_time() - start


def _whole_pages(memory: torch.Tensor) -> range:
    start, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    return range(-(-start // _PAGE_BYTES) * _PAGE_BYTES, end - _PAGE_BYTES + 1, _PAGE_BYTES)


huge_pages = HugePages()
"""Those of this process."""
