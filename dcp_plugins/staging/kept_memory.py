"""What stagers have in common that keep their memory from save to save."""

from __future__ import annotations

import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from dcp_plugins.contract import AsyncStager
from dcp_plugins.forks import in_forked_child
from dcp_plugins.staging.memory import HostMemory
from dcp_plugins.staging.snapshot import take_snapshot
from dcp_plugins.staging.streams import Copies
from dcp_plugins.staging.wrappers import is_plain_memory

__all__ = ["KeptMemoryStager", "PartialSnapshot", "StateDict"]

StateDict = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PartialSnapshot:
    """A state dict of which some tensors are copies and the others the originals."""

    state_dict: StateDict
    storages: frozenset[int]
    """The addresses of the storages that the copies are in."""

    def is_original(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor of it, or a part of one, may be memory that is not a copy."""
        return not is_plain_memory(tensor) or tensor.untyped_storage().data_ptr() not in self.storages


class KeptMemoryStager(AsyncStager):
    """What stagers have in common that keep their host memory, and perhaps a thread, from save to save.

    Args:
        memory: What to stage into.
        copies: How to copy.
    """

    def __init__(self, memory: HostMemory, copies: Copies) -> None:
        self._memory = memory
        self._copies = copies
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[StateDict] | None = None
        self._closed = False
        # Last: a thread may fork at any time.
        _stagers.add(self)

    @property
    def staging_nbytes(self) -> int:
        """Bytes of host memory kept for the next stage."""
        return self._memory.nbytes

    def stage_what_fits(self, state_dict: StateDict) -> PartialSnapshot:
        """Stage the small tensors, as far as there is memory; for a state dict that ``stage`` had no memory for.

        Raises:
            MemoryError: There is less than there seemed to be.
        """
        staged = self._take(state_dict, self._memory, room_bytes=self._memory.room_bytes())
        return PartialSnapshot(staged, self._memory.storages())

    def synchronize_staging(self) -> None:
        """Wait until the last staging has ended, and raise what it failed with."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """End the thread and free the memory; what was staged last stays valid as long as it is referenced."""
        if self._closed:
            return
        self._closed = True
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._last = None
        self._copies.close()
        self._memory.close()

    def forget(self) -> None:
        """In a forked child: the memory, the thread and the streams are the parent's, which may be staging."""
        self._memory.forget()
        self._copies.forget()
        self._thread = None
        self._last = None

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("this stager is closed: make a new one")

    def _take(self, state_dict: StateDict, memory: HostMemory, room_bytes: int | None = None) -> StateDict:
        try:
            return take_snapshot(state_dict, memory, self._copies.start, self._copies.wait, room_bytes=room_bytes)
        finally:
            # After a failure too: nothing may write into the memory, or read the tensors, any longer.
            self._copies.wait()

    def _own_thread(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="dcp-staging")
        return self._thread


# All that a fork inherits.
_stagers: weakref.WeakSet[KeptMemoryStager] = weakref.WeakSet()


def _forget_in_child() -> None:
    for stager in list(_stagers):
        stager.forget()


in_forked_child(_forget_in_child)
