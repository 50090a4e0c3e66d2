"""What an asynchronous save writes: a snapshot, or the original where there is no memory for a snapshot."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from typing import Any

import torch

from dcp_plugins.contract import AsyncStager, Metadata

__all__ = ["Snapshot"]

logger = logging.getLogger(__name__)

StateDict = dict[str, Any]


class Snapshot:
    """Stages a state dict; where the stager raises ``MemoryError`` the state dict itself is written.

    It must not change before it is written: ``async_save`` then returns, or ``completion`` is done, only after that.
    Each rank decides this for itself: for the others the save is the same.
    """

    def __init__(self, stager: AsyncStager, state_dict: StateDict) -> None:
        self.is_original = False
        """Whether what ``take`` returns is the original, as far as is known yet."""
        self.completion: Future[None] | None = None
        """Done when the original may change; None if the stager does not work in the background."""
        self._staging: StateDict | Future[StateDict]
        self._original: StateDict | None = None
        try:
            self._staging = stager.stage(state_dict)
        except MemoryError as exc:
            self._staging = state_dict
            self._use_original(exc)
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
            self._use_original(exc)
            return self._original

    def written(self, upload: Future[Metadata]) -> None:
        """Let the original change, which has been written instead of a snapshot; for the save's future to call."""
        if self.is_original and self.completion is not None:
            self.completion.set_result(None)
        self._original = None

    def _staged(self, staging: Future[StateDict]) -> None:
        assert self.completion is not None
        failure = staging.exception()
        if isinstance(failure, MemoryError):
            return
        self._original = None
        if failure is None:
            self.completion.set_result(None)
        else:
            self.completion.set_exception(failure)

    def _use_original(self, reason: MemoryError) -> None:
        self.is_original = True
        logger.warning(
            "no memory for a snapshot (%s): this save is written from the state dict itself, and blocks until it is",
            reason,
        )
        if torch.accelerator.is_available():
            # The background reads from a stream of its own: what the caller's has been told to compute must be there.
            torch.accelerator.synchronize()
