"""Loggers that read the checkpoints which a ``ModelCheckpoint`` has saved, most of them to upload them.

``ModelCheckpoint`` tells the loggers of a checkpoint when the call that saves it has returned. A save in the background
has only begun by then, and a copy of its directory would lack the commit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from dcp_plugins.errors import listing
from dcp_plugins.user_warnings import warn_user

__all__ = ["any_reads_checkpoints", "warn_of_missing_uploads"]


def any_reads_checkpoints(loggers: Iterable[Logger]) -> bool:
    """Tell whether a logger may read a checkpoint as soon as the logger is told of it."""
    return any(_uses_checkpoints(logger) and not _skips_directories(logger) for logger in loggers)


def warn_of_missing_uploads(loggers: Iterable[Logger]) -> None:
    """Warn of Lightning's loggers that are to upload checkpoints: they look for files, and skip directories."""
    silent = {type(logger).__name__ for logger in loggers if _uses_checkpoints(logger) and _skips_directories(logger)}
    if silent:
        warn_user(
            f"{listing(sorted(silent))} will upload no checkpoints: these loggers skip directories. Upload the"
            " directory in a subclass with an `after_save_checkpoint` of your own, or upload a file that"
            " dcp_plugins.lightning.consolidate has written after the run."
        )


def _uses_checkpoints(logger: Any) -> bool:
    """Tell whether a logger does anything when it is told of a checkpoint."""
    method = _function(logger.after_save_checkpoint)
    if method in (Logger.after_save_checkpoint, TensorBoardLogger.after_save_checkpoint):
        return False
    # Only Lightning's own methods ask for `log_model`. A user's subclass may upload whatever `log_model` says.
    return not _is_lightnings(method) or getattr(logger, "_log_model", True) is not False


def _skips_directories(logger: Any) -> bool:
    """Tell whether a logger looks for checkpoints with Lightning's function for that, which takes files only."""
    upload = getattr(logger, "_scan_and_log_checkpoints", None)
    return _is_lightnings(_function(logger.after_save_checkpoint)) and _is_lightnings(_function(upload))


def _is_lightnings(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("lightning.pytorch.loggers.")


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)
