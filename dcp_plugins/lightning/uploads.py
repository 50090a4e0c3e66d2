"""Loggers that upload the checkpoints which a ``ModelCheckpoint`` has saved.

``ModelCheckpoint`` tells the loggers of a checkpoint when its save has returned. A save in the background has only
begun by then, and a copy of its directory would lack the commit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from dcp_plugins.errors import listing
from dcp_plugins.user_warnings import warn_user

__all__ = ["read_by", "warn_of_missing_uploads"]

_OF_LIGHTNING = "lightning.pytorch.loggers."
_UPLOAD = "_scan_and_log_checkpoints"


def read_by(loggers: Iterable[Logger]) -> list[str]:
    """Return the classes of the loggers that may read a checkpoint as soon as it is saved."""
    return [type(logger).__name__ for logger in loggers if _may_read(logger)]


def warn_of_missing_uploads(loggers: Iterable[Logger]) -> None:
    """Warn of loggers of Lightning that are told to upload checkpoints: they look for files, and skip directories."""
    silent = sorted({type(logger).__name__ for logger in loggers if _may_read(logger) and _skips_directories(logger)})
    if silent:
        warn_user(
            f"{listing(silent)} will upload no checkpoints: these loggers skip directories. Upload the directory in a"
            " subclass with an `after_save_checkpoint` of your own, or upload a file that"
            " dcp_plugins.lightning.consolidate has written after the run."
        )


def _may_read(logger: Any) -> bool:
    method = _function(logger.after_save_checkpoint)
    if method in (Logger.after_save_checkpoint, TensorBoardLogger.after_save_checkpoint):
        return False
    return getattr(logger, "_log_model", True) is not False


def _skips_directories(logger: Any) -> bool:
    method = _function(logger.after_save_checkpoint)
    upload = _function(getattr(logger, _UPLOAD, method))
    return all(one.__module__.startswith(_OF_LIGHTNING) for one in (method, upload))


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)
