"""What ``ModelCheckpoint`` does right after a save, put off until the save is committed.

It deletes through the strategy, which can wait. The links of ``save_last="link"`` it makes itself, as soon as the save
has been called; there is no public seam for that.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from dcp_plugins.lightning.checkpoint_io import DCPCheckpointIO
from dcp_plugins.lightning.links import switch_link

__all__ = ["link_after_commit"]


def link_after_commit(callbacks: Iterable[Checkpoint]) -> None:
    """Let callbacks make their links once what these are to lead to is committed.

    A subclass that makes links in its own way is left alone.
    """
    for callback in callbacks:
        if getattr(type(callback), "_link_checkpoint", None) is ModelCheckpoint._link_checkpoint:
            callback._link_checkpoint = _link_checkpoint  # type: ignore[attr-defined]


def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
    """Stand in for ``ModelCheckpoint._link_checkpoint``, on every rank."""
    plugin: Any = trainer.strategy.checkpoint_io
    if not isinstance(plugin, DCPCheckpointIO):  # the callback is in use with another strategy by now
        ModelCheckpoint._link_checkpoint(trainer, filepath, linkpath)
    elif trainer.is_global_zero and Path(filepath).absolute() != Path(linkpath).absolute():
        plugin.after_commit(partial(switch_link, Path(linkpath), Path(filepath)))
