"""What an asynchronous save writes: a snapshot, or as much of one as there is memory for, and the rest as it is."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

import torch

from dcp_plugins.contract import AsyncStager, Metadata
from dcp_plugins.staging import PartialSnapshot

__all__ = ["Snapshot"]

logger = logging.getLogger(__name__)

StateDict = dict[str, Any]


@runtime_checkable
class _StagesInPart(Protocol):
    def stage_what_fits(self, state_dict: StateDict) -> PartialSnapshot: ...


class Snapshot:
    """Stages a state dict; where the stager raises ``MemoryError``, what does not fit is written from the original.

    That must not change before it is written: ``async_save`` then returns, or ``completion`` is done, only after that.
    Each rank decides this for itself: for the others the save is the same.

    Args:
        stager: Stages.
        state_dict: The original.
        in_part: Whether a part of it may be staged. What is not is to be written first, with a call of ``release``.
    """

    def __init__(self, stager: AsyncStager, state_dict: StateDict, *, in_part: bool) -> None:
        self.completion: Future[None] | None = None
        """Done when the original may change; None if the stager does not work in the background."""
        self.is_original: Callable[[torch.Tensor], bool] | None = None
        """Whether a tensor that is to be written is the original; None while all of them are copies."""
        self._stager = stager
        self._in_part = in_part
        self._released: Future[None] = Future()
        self._staging: StateDict | Future[StateDict]
        self._original: StateDict | None = None
        self._has_no_memory = False
        self._if_held: Callable[[], None] | None = None
        self._held: Future[None] | None = None
        """The completion, where the staging that would have ended it had no memory."""
        # Threads of the background have another.
        self._device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        try:
            self._staging = stager.stage(state_dict)
        except MemoryError as exc:
            self._staging = self._stage_what_fits(state_dict, exc)
            return
        if isinstance(self._staging, Future):
            self._original = state_dict
            self.completion = Future()
            self.completion.set_running_or_notify_cancel()
            self._staging.add_done_callback(self._staged)

    def take(self) -> StateDict:
        """Wait for the snapshot and return it, once, for the background's use."""
        # Not kept: the save's future keeps this object, and the memory is to be freed as soon as the save has ended.
        staging, self._staging = self._staging, {}
        if not isinstance(staging, Future):
            return staging
        try:
            return staging.result()
        except MemoryError as exc:
            assert self._original is not None
            self._held = self.completion
            return self._stage_what_fits(self._original, exc)

    def release(self) -> None:
        """Let the original change: all that is to be written of it has been."""
        # It may lead to the save's future, which leads here.
        self._if_held = None
        if self._released.done():
            return
        self._released.set_result(None)
        if self._held is not None:
            self._held.set_result(None)
        self._original = None

    def written(self, upload: Future[Metadata]) -> None:
        """Let the original change, whatever has become of the save; for the save's future to call."""
        self.release()

    def if_held(self, then: Callable[[], None]) -> None:
        """Call ``then`` if staging in the background finds no memory: the original is then held until it is written."""
        self._if_held = then
        # It may have found none already.
        if self._has_no_memory:
            then()

    def wait(self) -> None:
        """Wait until the original may change, if part of it is being written."""
        if self.is_original is not None:
            concurrent.futures.wait([self._released])

    def _staged(self, staging: Future[StateDict]) -> None:
        assert self.completion is not None
        failure = staging.exception()
        if isinstance(failure, MemoryError):
            self._has_no_memory = True
            if (then := self._if_held) is not None:
                then()
            return
        self._original = None
        if failure is None:
            self.completion.set_result(None)
        else:
            self.completion.set_exception(failure)

    def _stage_what_fits(self, state_dict: StateDict, reason: MemoryError) -> StateDict:
        if self._device is not None:
            # What the caller has told its device to compute must be there: for the copies, because they may have been
            # begun without a mark, and for the background, which reads the rest from a stream of its own.
            torch.accelerator.synchronize(self._device)
        partial = PartialSnapshot(state_dict, frozenset())
        if self._in_part and isinstance(self._stager, _StagesInPart):
            try:
                partial = self._stager.stage_what_fits(state_dict)
            except MemoryError:
                logger.debug("nothing is staged", exc_info=True)
        # Without the state dict: who is to tell its tensors apart may live longer.
        self.is_original = dataclasses.replace(partial, state_dict={}).is_original
        logger.warning(
            "no memory for a snapshot (%s): this save is written from the state dict itself, but for what fits, and"
            " blocks until that is done",
            # Not the exception, whose traceback has the state dict: handlers may keep what they are given.
            str(reason),
        )
        return partial.state_dict
