"""A page of memory that a training process and its checkpoint process share, to tell each other more than messages do.

byte 0        1 while somebody waits for the save; written by the training process
bytes 8..16   counts the steps of the save (see ``progress``); written by the checkpoint process
"""

from __future__ import annotations

import mmap

from dcp_plugins.format.memory import as_buffer
from dcp_plugins.staging.shared import descriptor_of, map_shared

__all__ = ["PAGE_BYTES", "SharedPage", "is_awaited", "progress_counter"]

PAGE_BYTES = mmap.PAGESIZE
_PROGRESS = slice(8, 16)


class SharedPage:
    """The page, as the training process sees it."""

    def __init__(self) -> None:
        page = map_shared(PAGE_BYTES)
        self.descriptor = descriptor_of(page.untyped_storage())
        self.awaited = as_buffer(page)
        """A buffer whose first element is the flag."""
        self._progress = memoryview(self.awaited)[_PROGRESS].cast("B").cast("Q")

    def num_steps(self) -> int:
        """Return how many steps of saves the checkpoint process has made."""
        return self._progress[0]


def is_awaited(page: mmap.mmap | None) -> bool:
    """In the checkpoint process: whether somebody waits for the save."""
    return page is not None and page[0] != 0


def progress_counter(page: mmap.mmap) -> memoryview:
    """In the checkpoint process: return the place to count steps in."""
    return memoryview(page)[_PROGRESS].cast("Q")
