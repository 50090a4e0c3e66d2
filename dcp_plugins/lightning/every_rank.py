"""What all strategies of this package have in common: checkpoints that every rank writes and reads.

A stock strategy calls its ``CheckpointIO`` on rank 0 with full tensors, or bypasses it for sharded ones. The mixin here
calls ours on every rank with the values as they are, and restores after the model has been set up, so that tensors are
read straight into where they stay.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer

from dcp_plugins.errors import CheckpointNotFoundError
from dcp_plugins.lightning.checkpoint_io import DCPCheckpointIO
from dcp_plugins.lightning.layout import ModelKey, is_committed, last_checkpoint
from dcp_plugins.state_dict import get_model_state_dict, get_optimizer_state_dict

__all__ = ["CheckpointsOnEveryRank"]

_PathLike = str | os.PathLike[str]
_Answer = TypeVar("_Answer")


class CheckpointsOnEveryRank(Strategy):
    """Mixed in before a strategy of Lightning: replaces how it saves, loads, and finds its ``CheckpointIO``."""

    _single_process = False
    _stock_model_key: ModelKey = "state_dict"

    @property
    def _stateful_module(self) -> nn.Module:
        """What the state dicts are taken from: the LightningModule, or a wrapper that keeps its parameters."""
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def checkpoint_io(self) -> DCPCheckpointIO:
        if self._checkpoint_io is None:
            self.checkpoint_io = DCPCheckpointIO()
        assert isinstance(self._checkpoint_io, DCPCheckpointIO)
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, plugin: CheckpointIO) -> None:
        if not isinstance(plugin, DCPCheckpointIO):
            raise TypeError(
                f"{type(self).__name__} needs a DCPCheckpointIO, got {type(plugin).__name__}: other plugins write on"
                " rank 0 only. Leave the plugin out, or use one of Lightning's own strategies with it."
            )
        plugin.single_process = self._single_process
        plugin.stock_model_key = self._stock_model_key
        self._checkpoint_io = plugin

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False  # load_checkpoint has restored it in place

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Collect the model's state under names that do not depend on the strategy: sharded values stay sharded."""
        return get_model_state_dict(self._stateful_module)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Collect an optimizer's state by the parameters' names."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        return get_optimizer_state_dict(self._stateful_module, optimizer)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Do nothing: `load_checkpoint` has loaded the model in place."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Do nothing: `load_checkpoint` has loaded the optimizers in place."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PathLike, storage_options: Any | None = None
    ) -> None:
        """Save on every rank to the path that rank 0 names."""
        path, aside = self._decide_on_rank_zero(lambda: _make_room(Path(filepath)))
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)
        if aside is not None and self.is_global_zero:
            aside.unlink(missing_ok=True)

    def load_checkpoint(self, checkpoint_path: _PathLike, weights_only: bool | None = None) -> dict[str, Any]:
        """Load model and, while fitting, optimizers in place; return the rest for Lightning to restore."""
        path = self._decide_on_rank_zero(lambda: _require_checkpoint(Path(checkpoint_path)))
        module = self.lightning_module
        assert module is not None
        is_fitting = module.trainer.state.fn == TrainerFn.FITTING
        return self.checkpoint_io.load_checkpoint(
            path,
            weights_only=weights_only,
            module=self._stateful_module,
            optimizers=self.optimizers if is_fitting else (),
            strict=module.strict_loading,
        )

    def _decide_on_rank_zero(self, decide: Callable[[], _Answer]) -> _Answer:
        """Run ``decide`` on rank 0 and return its answer, or raise its error, on every rank."""
        outcome: tuple[bool, Any] = (True, None)
        if self.is_global_zero:
            try:
                outcome = (True, decide())
            except Exception as exc:  # whatever it is, the other ranks are waiting to hear of it
                outcome = (False, exc)
        succeeded, value = self.broadcast(outcome)
        if not succeeded:
            raise value
        answer: _Answer = value
        return answer


def _make_room(path: Path) -> tuple[Path, Path | None]:
    """See to it that ``path`` can be a directory of its own. Runs on rank 0, before any rank writes.

    Returns:
        The path, and where an ordinary checkpoint file was put that had its name: to be deleted after the commit.
    """
    if path.is_symlink():
        # It leads to another checkpoint, which a save through it would overwrite.
        path.unlink()
    elif path.is_file():
        aside = path.with_name(f"{path.name}.replaced")
        path.replace(aside)
        return path, aside
    return path, None


def _require_checkpoint(path: Path) -> Path:
    """Return ``path`` if a checkpoint is there. Runs on rank 0."""
    if path.is_file() or is_committed(path):
        return path
    if path.is_dir():
        what = f"{path} is not a checkpoint: it has no .metadata, so the save into it never finished"
    else:
        what = f"there is no checkpoint at {path}"
    beside = last_checkpoint(path.parent)
    hint = f" The newest committed checkpoint beside it is {beside}." if beside is not None else ""
    raise CheckpointNotFoundError(f"Expected a committed checkpoint, but {what}.{hint}")
