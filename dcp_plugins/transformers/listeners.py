"""Callbacks that read a checkpoint's files in ``on_save``, such as those that upload it.

The Trainer calls ``on_save`` when its save has returned. A save in the background has only begun by then, and a copy of
its directory would lack the commit. So a save waits for its commit where such a callback is present.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils

__all__ = ["readers_of"]


def _never(callback: Any) -> bool:
    return False


# Whether the ``on_save`` of an integration of Transformers reads files, as the callback is configured.
_READS: dict[str, Callable[[Any], bool]] = {
    "ClearMLCallback": lambda callback: bool(callback._log_model),
    "DVCLiveCallback": lambda callback: callback._log_model == "all",
    "FlyteCallback": lambda callback: bool(callback.sync_checkpoints),
    "MLflowCallback": lambda callback: bool(callback._log_artifacts),
    "NeptuneCallback": lambda callback: bool(callback._should_upload_checkpoint),
    "SwanLabCallback": _never,
    "TrackioCallback": _never,
    "WandbCallback": lambda callback: callback._log_model == "checkpoint",
}


def readers_of(trainer: Trainer) -> list[str]:
    """Return the names of the callbacks, on this rank, that may read a checkpoint's files in ``on_save``.

    A callback with an ``on_save`` of its own counts, except an integration of Transformers that is not configured to
    read.
    """
    return [type(one).__name__ for one in trainer.callback_handler.callbacks if _may_read(one)]


def _may_read(callback: Any) -> bool:
    method = getattr(callback.on_save, "__func__", callback.on_save)
    if method is TrainerCallback.on_save or _is_of_this_package(method):
        return False
    if method.__module__ != integration_utils.__name__:
        return True
    reads = _READS.get(method.__qualname__.partition(".")[0])
    try:
        return reads is None or reads(callback)
    except AttributeError:
        # The integration has changed, or was never set up: it counts as a reader.
        return True


def _is_of_this_package(method: Any) -> bool:
    return str(method.__module__).startswith("dcp_plugins.")
