"""The stagers: who takes the snapshot of a state dict for an asynchronous save, in which memory, on which thread."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from dcp_plugins.contract import AsyncStager
from dcp_plugins.errors import StagingMemoryError, UnsupportedValueError, listing
from dcp_plugins.forks import in_forked_child
from dcp_plugins.staging.kept_memory import KeptMemoryStager, PartialSnapshot, StateDict
from dcp_plugins.staging.memory import HostMemory
from dcp_plugins.staging.placement import stand_for_originals
from dcp_plugins.staging.streams import Copies

__all__ = [
    "BlockingAsyncStager",
    "DefaultStager",
    "HandoverStager",
    "StagingOptions",
    "release_staging_memory",
    "shared_stager",
    "staging_memory_bytes",
]

logger = logging.getLogger(__name__)


@dataclass
class StagingOptions:
    """How ``DefaultStager`` stages. A machine without an accelerator gets what it can have, with one line in the log.

    Attributes:
        use_pinned_memory: Stage into page-locked memory, which devices copy to at full rate, shared or not. Needs CUDA.
        use_shared_memory: Stage into memory that another process can map.
        use_async_staging: Copy on a thread of the stager: ``stage`` returns a future, and parameters may change once
            it is done.
        use_non_blocking_copy: Issue the copies from a device without waiting for each. Needs an accelerator.
    """

    use_pinned_memory: bool = True
    use_shared_memory: bool = True
    use_async_staging: bool = True
    use_non_blocking_copy: bool = True


class DefaultStager(KeptMemoryStager):
    """Stage into host memory that is kept from save to save, until ``close``.

    What ``stage`` returns is valid until the next ``stage`` of the same stager, which writes into the same memory.
    Called by ``async_save``, on the thread that calls it; not thread-safe.

    Args:
        config: How to stage.
        max_staging_bytes: The most host memory to take and keep. ``stage`` raises ``StagingMemoryError`` for a state
            dict that needs more; ``async_save`` then writes it from its own memory, and returns when that is done.
            None leaves it at what the machine has.
    """

    def __init__(
        self,
        config: StagingOptions = StagingOptions(),  # noqa: B008 - never changed
        *,
        max_staging_bytes: int | None = None,
    ) -> None:
        if max_staging_bytes is not None and max_staging_bytes <= 0:
            raise ValueError(f"max_staging_bytes must be positive, or None for no limit; got {max_staging_bytes}")
        self._config = config
        pinned = config.use_pinned_memory and torch.cuda.is_available()
        non_blocking = config.use_non_blocking_copy and torch.accelerator.is_available()
        _say_what_is_missing(config, pinned=pinned, non_blocking=non_blocking)
        super().__init__(
            HostMemory(pinned=pinned, shared=config.use_shared_memory, max_bytes=max_staging_bytes),
            Copies(non_blocking=non_blocking),
        )

    def stage(self, state_dict: StateDict, **kwargs: Any) -> StateDict | Future[StateDict]:
        """Return a snapshot, or with ``use_async_staging`` the future of one.

        Args:
            state_dict: Nested dict of tensors and other values.
            **kwargs: Accepted, as by torch's stager, and without effect.
        """
        self._require_open()
        self._copies.mark()
        if not self._config.use_async_staging:
            return self._take(state_dict, self._memory)
        self._last = self._own_thread().submit(self._take, state_dict, self._memory)
        return self._last


class HandoverStager(KeptMemoryStager):
    """Stage on the calling thread into memory that another process can map; the first time in two steps.

    Shared memory comes in small pages, whose first touch takes several times longer than that of private memory in
    huge ones. So the first snapshot is taken into private memory, and ``hand_over``, which is for the background,
    moves it into shared memory, where later ones are taken to directly. For that while there are two copies, unless
    memory is short.
    """

    def __init__(self) -> None:
        pinned = torch.cuda.is_available()
        # There has to be room for the shared memory as well.
        self._first = HostMemory(pinned=pinned, times_needed=2)
        self._is_private = False
        super().__init__(
            HostMemory(pinned=pinned, shared=True),
            Copies(non_blocking=torch.accelerator.is_available()),
        )

    @property
    def staging_nbytes(self) -> int:
        """Bytes of host memory kept for the next stage, and of a first snapshot that is not handed over yet."""
        return self._memory.nbytes + self._first.nbytes

    def stage(self, state_dict: StateDict) -> StateDict:
        """Return a snapshot, valid until the next stage; for ``hand_over``."""
        self._require_open()
        self._copies.mark()
        self._is_private = not self._memory.nbytes
        if self._is_private:
            try:
                return self._take(state_dict, self._first)
            except StagingMemoryError:
                self._is_private = False
        return self._take(state_dict, self._memory)

    def hand_over(self, staged: StateDict) -> StateDict:
        """Return what was staged last, in shared memory if there is any.

        Called once for each ``stage``, on any thread, before the next ``stage``.
        """
        if not self._is_private:
            return staged
        self._is_private = False
        try:
            moved = self._take(staged, self._memory)
            stand_for_originals(self._memory, self._first)
            return moved
        except StagingMemoryError as exc:
            logger.warning("no shared memory for the snapshot (%s): its bytes are sent to the checkpoint process", exc)
            return staged
        finally:
            # Freed when the last reference to what was staged is gone.
            self._first.close()

    def close(self) -> None:
        super().close()
        self._first.close()

    def forget(self) -> None:
        super().forget()
        self._first.forget()


class BlockingAsyncStager(AsyncStager):
    """Stage into host memory on the calling thread.

    Args:
        cache_staged_state_dict: Keep the memory for the next stage; what was staged is then valid until that. False
            takes new memory each time, which costs several times more.
        type_check: Refuse values other than tensors, numbers, strings, bytes and ``BytesIO`` in the usual containers.
    """

    _synchronize_after_execute: bool = False

    def __init__(self, cache_staged_state_dict: bool = False, type_check: bool = False) -> None:
        self.cache_staged_state_dict = cache_staged_state_dict
        self.type_check = type_check
        self.state_dict_cache: StateDict | None = None
        self._stager: DefaultStager | None = None

    @property
    def staging_nbytes(self) -> int:
        """Bytes of host memory kept for the next stage."""
        return 0 if self._stager is None else self._stager.staging_nbytes

    def stage(self, state_dict: StateDict) -> StateDict:
        """Return a snapshot."""
        if self.type_check:
            _check_types(state_dict)
        if not self.cache_staged_state_dict:
            stager = DefaultStager(_plain_options())
            try:
                return _staged(stager, state_dict)
            finally:
                stager.close()
        if self._stager is None:
            self._stager = DefaultStager(_plain_options())
        self.state_dict_cache = _staged(self._stager, state_dict)
        return self.state_dict_cache

    def stage_what_fits(self, state_dict: StateDict) -> PartialSnapshot:
        """As ``DefaultStager`` does it, into memory that is kept in any case; for after ``stage`` had none."""
        if self._stager is None:
            self._stager = DefaultStager(_plain_options())
        return self._stager.stage_what_fits(state_dict)

    def synchronize_staging(self) -> None:
        """Return at once: ``stage`` has waited."""

    def close(self) -> None:
        """Free the memory; the next ``stage`` takes new."""
        self.state_dict_cache = None
        if self._stager is not None:
            self._stager.close()
            self._stager = None


# One of each class at most.
_shared_stagers: dict[type[KeptMemoryStager], DefaultStager | HandoverStager] = {}
_lock = threading.Lock()


def shared_stager(*, for_process: bool = False) -> DefaultStager | HandoverStager:
    """Return the stager of this process for asynchronous saves that bring none; its memory is kept between them.

    Args:
        for_process: Stage where another process can map it, with a ``HandoverStager``.
    """
    kind = HandoverStager if for_process else DefaultStager
    with _lock:
        stager = _shared_stagers.get(kind)
        if stager is None:
            stager = _shared_stagers[kind] = HandoverStager() if for_process else DefaultStager(_plain_options())
        return stager


def staging_memory_bytes() -> int:
    """Return the bytes of host memory that asynchronous saves without a stager of their own keep for the next one.

    A stager of the caller's own reports its part as ``staging_nbytes``.
    """
    with _lock:
        return sum(stager.staging_nbytes for stager in _shared_stagers.values())


def release_staging_memory() -> None:
    """Free the memory that asynchronous saves without a stager of their own keep; the next one takes it anew.

    Call it when no save is in flight.
    """
    with _lock:
        stagers = list(_shared_stagers.values())
        _shared_stagers.clear()
    for stager in stagers:
        stager.close()


def _renew_lock() -> None:
    global _lock  # noqa: PLW0603 - a thread of the parent may have held it
    _lock = threading.Lock()


in_forked_child(_renew_lock)


def _plain_options() -> StagingOptions:
    """Return the options for staging on the calling thread, as fast as this machine can."""
    return StagingOptions(
        use_pinned_memory=torch.cuda.is_available(),
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=torch.accelerator.is_available(),
    )


def _staged(stager: DefaultStager, state_dict: StateDict) -> StateDict:
    staged = stager.stage(state_dict)
    assert not isinstance(staged, Future), "these stagers stage on the calling thread"
    return staged


_missing_said = False


def _say_what_is_missing(config: StagingOptions, *, pinned: bool, non_blocking: bool) -> None:
    global _missing_said  # noqa: PLW0603 - said once in a process, not at every save
    missing = []
    if config.use_pinned_memory and not pinned:
        missing.append("pinned memory (use_pinned_memory)")
    if config.use_non_blocking_copy and not non_blocking:
        missing.append("non-blocking copies (use_non_blocking_copy)")
    if missing and not _missing_said:
        _missing_said = True
        logger.warning("no accelerator here: checkpoints are staged without %s", " and ".join(missing))


_CHECKED_TYPES = (torch.Tensor, int, float, complex, str, bytes, io.BytesIO, type(None))


def _check_types(state_dict: StateDict) -> None:
    wrong = list(_of_other_types(state_dict, ""))
    if wrong:
        raise UnsupportedValueError(
            f"type_check: expected tensors, numbers, strings, bytes and BytesIO, found {listing(wrong)}. "
            "Pass type_check=False to stage values of any type"
        )


def _of_other_types(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _of_other_types(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            yield from _of_other_types(item, f"{name}.{position}")
    elif not isinstance(value, _CHECKED_TYPES):
        yield f"'{name}' ({type(value).__name__})"
