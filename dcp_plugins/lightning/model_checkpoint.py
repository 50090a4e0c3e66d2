"""How ``ModelCheckpoint`` makes and names the links of ``save_last="link"`` under the strategies of this package.

It makes a link as soon as a save has been called, but a save in the background is not committed then. It gives the link
another name if the name is taken, but a link that has led to a deleted checkpoint leads to the newest one here, where
stock leaves a link to nothing. There is no public seam for either, so methods of the callbacks are replaced.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from dcp_plugins.lightning.checkpoint_io import DCPCheckpointIO

__all__ = ["adapt_links"]


def adapt_links(callbacks: Iterable[Checkpoint]) -> None:
    """Let callbacks make their links once what these are to lead to is committed, under the names that stock gives.

    A subclass that makes or names links in its own way is left alone.
    """
    for callback in callbacks:
        kind = type(callback)
        if getattr(kind, "_link_checkpoint", None) is ModelCheckpoint._link_checkpoint:
            callback._link_checkpoint = _link_checkpoint  # type: ignore[attr-defined]
        if getattr(kind, "file_exists", None) is ModelCheckpoint.file_exists:
            callback.file_exists = partial(_file_exists, callback)  # type: ignore[attr-defined]


def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
    """Stand in for ``ModelCheckpoint._link_checkpoint``, on every rank."""
    plugin: Any = trainer.strategy.checkpoint_io
    if not isinstance(plugin, DCPCheckpointIO):  # the callback is in use with another strategy by now
        ModelCheckpoint._link_checkpoint(trainer, filepath, linkpath)
    elif trainer.is_global_zero and Path(filepath).absolute() != Path(linkpath).absolute():
        plugin.link(Path(linkpath), Path(filepath))


def _file_exists(callback: Any, filepath: str, trainer: Trainer) -> bool:
    """Stand in for ``ModelCheckpoint.file_exists``, on every rank."""
    plugin: Any = trainer.strategy.checkpoint_io
    is_link_of_deleted = isinstance(plugin, DCPCheckpointIO) and plugin.is_link_of_deleted(filepath)
    exists: bool = trainer.is_global_zero and callback._fs.exists(filepath) and not is_link_of_deleted
    # Only rank 0 knows: any rank's yes is the answer of all.
    return trainer.strategy.reduce_boolean_decision(exists, all=False)
