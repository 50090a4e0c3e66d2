"""How ``ModelCheckpoint`` makes and names the links of ``save_last="link"`` under the strategies of this package.

``ModelCheckpoint`` makes a link as soon as a save has been called, but a save in the background is not committed then.
It gives a link another name if the name is taken. When a checkpoint is deleted, the strategies switch its link to the
newest checkpoint, where stock leaves a link without a target: the name of such a link must not count as taken.
Lightning has no public interface for either, so methods of the callbacks are replaced.
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
    """Let callbacks make a link once its checkpoint is committed, under the name that stock gives.

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
    # Only rank 0 looks at the files: all ranks answer yes if one rank does.
    return trainer.strategy.reduce_boolean_decision(exists, all=False)
