"""The mixin of all strategies of this package: checkpoints that every rank writes and reads.

A stock strategy calls its ``CheckpointIO`` on rank 0 with full tensors, or bypasses it for sharded ones. The mixin here
calls ours on every rank with the values as they are, and restores in the order in which the stock strategy does.
Tensors that no hook has touched are read straight into where they stay (`restoring.py`). With ``asynchronous=True``,
saves during a fit go on in the background.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerState, TrainerStatus
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dcp_plugins.errors import CheckpointException, CheckpointNotFoundError
from dcp_plugins.lightning.checkpoint_io import DCPCheckpointIO
from dcp_plugins.lightning.interruption import raise_unless_everywhere
from dcp_plugins.lightning.layout import META_FILES, last_checkpoint, saved_step
from dcp_plugins.lightning.model_checkpoint import adapt_links
from dcp_plugins.lightning.optimizer_state import optimizer_state_of
from dcp_plugins.lightning.paths import local_path, refuse_urls
from dcp_plugins.lightning.requeue import Requeue, is_requeue_checkpoint
from dcp_plugins.lightning.restoring import Opened, Restoring
from dcp_plugins.lightning.strategy_base import SavesThroughDCP, instead_of, make_room
from dcp_plugins.lightning.twin import Fingerprint
from dcp_plugins.lightning.uploads import any_reads_checkpoints, warn_of_missing_uploads
from dcp_plugins.manager import SaveOptions, is_committed, remove_if_uncommitted
from dcp_plugins.manager.agreement import deciding_ranks
from dcp_plugins.manager.diverging import Replicas
from dcp_plugins.manager.failed_saves import missing_commit
from dcp_plugins.manager.saver import renormed_weights
from dcp_plugins.plan.flatten import KeyPath
from dcp_plugins.state_dict import get_model_state_dict
from dcp_plugins.user_warnings import warn_user

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["CheckpointsOnEveryRank"]

log = logging.getLogger(__name__)

_PathLike = str | os.PathLike[str]

# The names that Lightning looks for when it is told to resume from "last".
_IS_LAST = re.compile(r"last(-|$)")


class _NoCheckpoint(dict[str, Any]):
    """A checkpoint for a run that begins anew: Lightning restores nothing from a checkpoint that is false."""

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class _Saved:
    path: Path
    step: int
    options: SaveOptions
    fingerprint: Fingerprint


class CheckpointsOnEveryRank(SavesThroughDCP, Strategy):
    """Mixed in before a strategy of Lightning's Trainer: replaces how it saves, loads, and finds its ``CheckpointIO``.

    ``asynchronous`` is for saves while a fit goes on. One that failed raises at the next one, on every rank, or when
    the fit ends, which waits for the last save. Saves outside of a fit are in the foreground.
    """

    _shards_model = False
    """Whether the strategy gives each rank shards of the model."""
    _opened: Opened | None = None
    """The checkpoint that is being restored."""
    _saved: _Saved | None = None
    """The last save in the background: the next save may be of the same step and values."""
    _has_saved_again = False
    _last_trained: Replicas | None = None
    """The replicas of the model that was trained last."""
    _step_hook: RemovableHandle | None = None
    _interruption_timeout_seconds = 30.0
    """How long a rank that an exception has interrupted waits for the others to be interrupted, too."""

    @property
    def _stateful_module(self) -> nn.Module:
        """The module to take state dicts from: the LightningModule, or a wrapper that keeps its parameters."""
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
        """Tell when to restore, as stock's strategy does: a module cannot load shards before it is sharded."""
        return self._shards_model

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Collect the model's state under names that do not depend on the strategy: sharded values stay sharded."""
        return get_model_state_dict(self._stateful_module)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Collect an optimizer's state by the parameters' names."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        return optimizer_state_of(self._stateful_module, optimizer)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the model; entries of the state dict that no hook has touched are read in place."""
        self._restoring().restore_model(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers; states that no hook has touched are read in place."""
        self._restoring().restore_optimizers(
            self.optimizers,
            checkpoint["optimizer_states"],
            after_load=lambda optimizer: _optimizer_to_device(optimizer, self.root_device),
        )

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PathLike, storage_options: Any | None = None
    ) -> None:
        """Save on every rank to the path that rank 0 names."""
        path = local_path(filepath)
        if not self._is_interrupted:
            self._save(checkpoint, path, storage_options)
            if self.is_global_zero and self._trainer is not None and any_reads_checkpoints(self._trainer.loggers):
                # `ModelCheckpoint` tells the loggers next: without the wait, they would find no commit.
                self.checkpoint_io.wait()
            return
        if not self._single_process:
            raise_unless_everywhere(timeout_seconds=self._interruption_timeout_seconds)
        try:
            self._save(checkpoint, path, storage_options)
        except Exception:  # a failed save must not hide the exception that has interrupted the run
            log.exception("The run was interrupted, and its checkpoint %s could not be saved", filepath)

    def _save(self, checkpoint: dict[str, Any], path: Path, storage_options: Any | None) -> None:
        plugin = self.checkpoint_io
        is_last_chance = self._is_interrupted or is_requeue_checkpoint(path)
        in_background = self._is_fitting and not is_last_chance
        asynchronous = self._asynchronous if in_background else "off"
        options = plugin.options_for(storage_options, asynchronous)
        parts, rest = plugin.parts_of(checkpoint)
        before, self._saved = self._saved, None
        fingerprint: Fingerprint | None = None
        if options.asynchronous != "off" and options.overlap_staging:
            fingerprint = Fingerprint(parts, self._stateful_module, self.optimizers)
            if before is not None and self._is_saved(before, path, rest, options, fingerprint):
                path, aside = self._decide_on_rank_zero(lambda: self._make_room(path))
                with plugin.saving(asynchronous, again=True):
                    plugin.save_checkpoint(checkpoint, path, storage_options)
                self._saved, self._has_saved_again = before, True
                self._delete_after_commit(aside)
                return
        try:
            # Its failure is raised before anything is made ready for this save.
            plugin.finish()
        except Exception:  # with what it failed does not matter to the last save there may be
            if not is_last_chance:
                raise
            log.exception("A save in the background failed: its checkpoint does not exist")
        path, aside = self._decide_on_rank_zero(lambda: self._make_room(path))
        if self._trainer is not None:
            adapt_links(self._trainer.checkpoint_callbacks)
        changed_by_forward = renormed_weights([self._stateful_module])
        with plugin.saving(
            asynchronous,
            optimizers=self.optimizers,
            changed_by_forward=changed_by_forward,
            diverging=self._diverging_in(parts),
        ):
            plugin.save_checkpoint(checkpoint, path, storage_options)
        if fingerprint is not None:
            self._saved = _Saved(path, rest["global_step"], options, fingerprint)
        self._delete_after_commit(aside)

    def _diverging_in(self, parts: Mapping[str, Any]) -> Iterator[KeyPath]:
        """Yield the paths of values that ranks may hold with different contents, of which stock saves rank 0's."""
        if self.checkpoint_io.no_dist:
            return
        assert self.model is not None
        replicas = Replicas([self.model]) or self._last_trained or Replicas([])
        model_key, *optimizer_keys = parts
        optimizers = (((key,), own) for key, own in zip(optimizer_keys, self.optimizers, strict=False))
        yield from replicas.diverging([((model_key,), parts[model_key])], optimizers)

    def _make_room(self, path: Path) -> tuple[Path, Path | None]:
        plugin = self.checkpoint_io
        plugin.raise_noted_failure()
        return make_room(path, sync=plugin.options.sync_files)

    def _delete_after_commit(self, aside: Path | None) -> None:
        if aside is not None and self.is_global_zero:
            self.checkpoint_io.after_commit(aside.unlink)

    def _is_saved(
        self, before: _Saved, path: Path, rest: dict[str, Any], options: SaveOptions, now: Fingerprint
    ) -> bool:
        """Agree whether, on every rank, what is to be saved is what the last save in the background has saved."""
        plugin = self.checkpoint_io
        if (before.step, before.options, before.path) != (rest["global_step"], options, plugin.newest):
            return False
        ranks = deciding_ranks(no_dist=plugin.no_dist)
        is_same = before.fingerprint.proves_same(now) and path.absolute() != before.path.absolute()
        return all(ranks.all_gather("compare", lambda: is_same))

    def _forget_saved(self, *_: Any) -> None:
        """Let the next save write all of its tensors: they are about to be changed.

        Not every write is counted in a tensor's version: fused optimizers, statistics of a batch norm and third-party
        kernels go past it. Nor does each step of an optimizer count in ``global_step``.
        """
        self._saved = None

    @property
    def _is_fitting(self) -> bool:
        """Whether training will go on after this, as far as one can tell.

        Lightning calls ``on_fit_end`` after `teardown`, with the status still "running". No later call would wait for
        a save in the background that began then.
        """
        state = self._run_state
        is_running = state is not None and state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING
        is_between_start_and_teardown = self._step_hook is not None
        return is_running and is_between_start_and_teardown

    @property
    def _is_interrupted(self) -> bool:
        """Whether Lightning is handling the exception that has ended a run, and its callbacks are told of it."""
        state = self._run_state
        return state is not None and state.status == TrainerStatus.INTERRUPTED and state.stage is not None

    @property
    def _run_state(self) -> TrainerState | None:
        return None if self._trainer is None else self._trainer.state

    @property
    def _trainer(self) -> Trainer | None:
        """The module's trainer; None for a module that was connected by hand and never ran."""
        assert self.lightning_module is not None
        return self.lightning_module._trainer

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.lightning_module is not None
        if self.is_global_zero:
            warn_of_missing_uploads(self.lightning_module.trainer.loggers)
        # Without this check, a URL would be refused only at the first save, and the training until then would be lost.
        callbacks = self.lightning_module.trainer.checkpoint_callbacks
        refuse_urls(getattr(callback, "dirpath", None) for callback in callbacks)
        if self._opened is not None:
            self._opened.detach()
        # Lightning has set its handlers by now.
        self._requeue = Requeue(self.lightning_module.trainer, no_dist=self.checkpoint_io.no_dist)
        if self._step_hook is None:
            self._step_hook = register_optimizer_step_pre_hook(self._forget_saved)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._requeue.answer_if_asked()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_saved()
        return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_saved()
        return super().validation_step(*args, **kwargs)

    def teardown(self) -> None:
        """Finish the save in the background first. What it failed with is raised, unless the fit has failed itself."""
        plugin = self.checkpoint_io
        try:
            plugin.finish()
            if self._has_saved_again and not self._is_interrupted:  # otherwise a rank may be here alone
                self._decide_on_rank_zero(plugin.raise_noted_failure)
        except Exception:  # it must not hide the exception that is being raised
            module = self.lightning_module
            if module is None or module.trainer.state.status != TrainerStatus.INTERRUPTED:
                raise
            log.exception("The last save in the background failed, too: its checkpoint does not exist")
        finally:
            self._saved, self._has_saved_again = None, False
            self._opened = None
            if self.model is not None:
                # Stock's method takes the model out of DDP's wrapper. The final checkpoint may be saved after that.
                self._last_trained = Replicas([self.model]) or self._last_trained
            if self._step_hook is not None:
                self._step_hook.remove()
                self._step_hook = None
            super().teardown()

    def load_checkpoint(self, checkpoint_path: _PathLike, weights_only: bool | None = None) -> dict[str, Any]:
        """Return the checkpoint, whose tensors are read when they are asked for or restored."""
        plugin = self.checkpoint_io
        plugin.wait()
        path = self._decide_on_rank_zero(lambda: self._find_checkpoint(local_path(checkpoint_path)))
        if path is None:
            return _NoCheckpoint({"pytorch-lightning_version": lightning.__version__})
        # Each rank reads by itself, so one rank may fail alone.
        ranks = deciding_ranks(no_dist=plugin.no_dist)
        try:
            checkpoint = ranks.settle("read", lambda: plugin.load_checkpoint(path, weights_only=weights_only))
        except CheckpointException as exc:
            own = exc.failures.get(ranks.rank)
            if own is None:
                raise
            raise own[0] from None
        self._opened = Opened(checkpoint)
        return checkpoint

    def _restoring(self) -> Restoring:
        return Restoring(
            # Nothing is open for a checkpoint that the caller has read in another way.
            opened=self._opened or Opened({}),
            module=self._stateful_module,
            is_sharded=self._shards_model,
            no_dist=self.checkpoint_io.no_dist,
        )

    def _find_checkpoint(self, path: Path) -> Path | None:
        """Return the checkpoint to load for ``path``, or None if training can start anew. Runs on rank 0.

        Lightning takes any directory with one of the names that it looks for, even one that a killed first save has
        left. Instead of such a directory, this returns the newest checkpoint beside it or where the run's callbacks
        save.
        """
        if path.is_file() or is_committed(path):
            return path
        replaced = instead_of(path)
        if replaced is not None:
            return replaced
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        is_fitting = trainer.state.fn == TrainerFn.FITTING
        beside = last_checkpoint(path.parent)
        newest = _newest_of_run(beside, trainer) if is_fitting else beside
        if path.is_dir() and _is_looked_for(path, trainer) and (newest is not None or is_fitting):
            instead = f"Going on from {newest}, the newest there is." if newest is not None else "Starting anew."
            warn_user(f"{path} is not a checkpoint: the save into it was killed before it was committed. {instead}")
            if is_fitting:
                # The name has to be free for the run's next checkpoint of this name.
                remove_if_uncommitted(path, META_FILES)
            return newest
        what = f"is not a checkpoint: {missing_commit(path)}" if path.is_dir() else "does not exist"
        hint = f" The newest committed checkpoint beside it is {beside}." if beside is not None else ""
        # The message begins like stock's, for programs that look for these words.
        raise CheckpointNotFoundError(f"Checkpoint file not found: {path} {what}.{hint}")


def _newest_of_run(beside: Path | None, trainer: Trainer) -> Path | None:
    """Choose the newest of a checkpoint and those where the callbacks save."""
    folders = [one.dirpath for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint) and one.dirpath]
    found = [one for one in (beside, *map(last_checkpoint, folders)) if one is not None]
    return max(found, key=saved_step, default=None)


def _is_looked_for(path: Path, trainer: Trainer) -> bool:
    """Tell whether Lightning looks for this name by itself: "last", before a requeue, or on an exception."""
    if _IS_LAST.match(path.stem) or is_requeue_checkpoint(path):
        return True
    callbacks = [one for one in trainer.callbacks if isinstance(one, OnExceptionCheckpoint)]  # type: ignore[attr-defined]
    return any(path.absolute() == Path(one.ckpt_path).absolute() for one in callbacks)
