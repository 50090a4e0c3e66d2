"""What all strategies of this package have in common: checkpoints that every rank writes and reads.

A stock strategy calls its ``CheckpointIO`` on rank 0 with full tensors, or bypasses it for sharded ones. The mixin here
calls ours on every rank with the values as they are, and restores after the model has been set up, so that tensors are
read straight into where they stay. With ``asynchronous=True``, saves during a fit go on in the background.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import nn
from torch.optim import Optimizer

from dcp_plugins.errors import CheckpointNotFoundError
from dcp_plugins.lightning.checkpoint_io import DCPCheckpointIO
from dcp_plugins.lightning.layout import META_FILES, last_checkpoint
from dcp_plugins.lightning.model_checkpoint import link_after_commit
from dcp_plugins.lightning.strategy_base import SavesThroughDCP, make_room, renormed
from dcp_plugins.manager import is_committed, remove_if_uncommitted
from dcp_plugins.state_dict import get_model_state_dict, get_optimizer_state_dict

__all__ = ["CheckpointsOnEveryRank"]

log = logging.getLogger(__name__)

_PathLike = str | os.PathLike[str]

# The names that Lightning looks for when it is told to resume from "last".
_IS_LAST = re.compile(r"last(-|$)")


class CheckpointsOnEveryRank(SavesThroughDCP, Strategy):
    """Mixed in before a strategy of Lightning's Trainer: replaces how it saves, loads, and finds its ``CheckpointIO``.

    ``asynchronous`` is for saves while a fit goes on. One that failed raises at the next one, on every rank, or when
    the fit ends, which waits for the last save. Saves outside of a fit are in the foreground.
    """

    @property
    def _stateful_module(self) -> nn.Module:
        """What the state dicts are taken from: the LightningModule, or a wrapper that keeps its parameters."""
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def checkpoint_io(self) -> DCPCheckpointIO:
        return self._io()

    @checkpoint_io.setter
    def checkpoint_io(self, plugin: CheckpointIO) -> None:
        self._accept_io(plugin)

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
        plugin = self.checkpoint_io
        # Its failure is raised before anything is made ready for this save.
        plugin.finish()
        path, aside = self._decide_on_rank_zero(lambda: make_room(Path(filepath), sync=plugin.options.sync_files))
        options = plugin.options_for(storage_options, self._asynchronous if self._is_fitting else "off")
        if options.asynchronous != "off":
            assert self.lightning_module is not None
            link_after_commit(self.lightning_module.trainer.checkpoint_callbacks)
        plugin.save_parts(
            *plugin.parts_of(checkpoint),
            path,
            options=options,
            optimizers=self.optimizers,
            changed_by_forward=renormed(self._stateful_module),
        )
        if aside is not None and self.is_global_zero:
            plugin.after_commit(aside.unlink)

    @property
    def _is_fitting(self) -> bool:
        """Whether training will go on after this, as far as one can tell."""
        module = self.lightning_module
        assert module is not None
        state = module.trainer.state
        return state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING

    def teardown(self) -> None:
        """Finish the save in the background first. What it failed with is raised, unless the fit has failed itself."""
        try:
            self.checkpoint_io.finish()
        except Exception:  # it must not hide the exception that is being raised
            module = self.lightning_module
            if module is None or module.trainer.state.status != TrainerStatus.INTERRUPTED:
                raise
            log.exception("The last save in the background failed, too: its checkpoint does not exist")
        finally:
            super().teardown()

    def load_checkpoint(self, checkpoint_path: _PathLike, weights_only: bool | None = None) -> dict[str, Any]:
        """Load model and, while fitting, optimizers in place; return the rest for Lightning to restore."""
        self.checkpoint_io.wait()
        module = self.lightning_module
        assert module is not None
        is_fitting = module.trainer.state.fn == TrainerFn.FITTING
        path = self._decide_on_rank_zero(lambda: _find_checkpoint(Path(checkpoint_path), is_fitting=is_fitting))
        if path is None:
            # What is restored from this is what there is.
            return module.trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        return self.checkpoint_io.load_checkpoint(
            path,
            weights_only=weights_only,
            module=self._stateful_module,
            optimizers=self.optimizers if is_fitting else (),
            strict=module.strict_loading,
        )


def _find_checkpoint(path: Path, *, is_fitting: bool) -> Path | None:
    """Return where the checkpoint is that ``path`` means. Runs on rank 0.

    Lightning takes whatever has the name for "last", also what a kill has left of the first save under that name. In
    its place comes the newest checkpoint beside it, or None if there is none and training can start anew.
    """
    if path.is_file() or is_committed(path):
        return path
    beside = last_checkpoint(path.parent)
    if path.is_dir() and _IS_LAST.match(path.stem) and (beside is not None or is_fitting):
        instead = f"Going on from {beside}, the newest beside it." if beside is not None else "Starting anew."
        warnings.warn(
            f"{path} is not a checkpoint: the save into it was killed before it was committed. {instead}", stacklevel=2
        )
        if is_fitting:
            # So that the name is free for the next checkpoint that is to have it.
            remove_if_uncommitted(path, META_FILES)
        return beside
    if path.is_dir():
        what = f"{path} is not a checkpoint: it has no .metadata, so the save into it never finished"
    else:
        what = f"there is no checkpoint at {path}"
    hint = f" The newest committed checkpoint beside it is {beside}." if beside is not None else ""
    raise CheckpointNotFoundError(f"Expected a committed checkpoint, but {what}.{hint}")
