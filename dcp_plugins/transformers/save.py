"""Saving a checkpoint of a Trainer: the steps of `Trainer._save_checkpoint`, with one save through the engine.

The optimizer is saved with the state that it has: none before its first step.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from dcp_plugins.manager import OptimizerState, RandomState, Saver, is_committed
from dcp_plugins.manager.agreement import deciding_ranks
from dcp_plugins.manager.diverging import Replicas
from dcp_plugins.manager.saver import renormed_weights
from dcp_plugins.plan.flatten import KeyPath
from dcp_plugins.plan.unloadable import warn_of_unloadable
from dcp_plugins.plan.values import dump_value
from dcp_plugins.state_dict import get_model_state_dict
from dcp_plugins.storage.local import make_directory
from dcp_plugins.transformers.adapters import only_adapters
from dcp_plugins.transformers.layout import (
    MODEL,
    NAMES,
    OPTIMIZER,
    RANDOM,
    STATE,
    TRAINER,
    forget_state,
    has_stock_files,
    is_stock,
    publish_state,
    rotate,
)
from dcp_plugins.transformers.unwrapped import bare_optimizer, model_of, scheduler_of
from dcp_plugins.transformers.writers import Writers

__all__ = [
    "SCALER",
    "SCHEDULER",
    "save_checkpoint",
]

log = logging.getLogger(__name__)

SCHEDULER = "scheduler"
SCALER = "scaler"


def save_checkpoint(
    trainer: Trainer,
    saver: Saver,
    writers: Writers,
    *,
    trial: Any,
    hf_weights: bool,
    push: bool,
    commit_first: bool,
    in_use: Sequence[Path],
    own: Sequence[Path],
) -> Path:
    """Save a checkpoint of a Trainer at its current step, and return where; every rank calls it.

    Args:
        trainer: The Trainer, in training.
        saver: Makes the save. The failure of its last save is raised here.
        writers: Writes the files beside the checkpoint's own data.
        trial: The trial of a hyperparameter search, or None.
        hf_weights: Also write the files that ``from_pretrained`` loads.
        push: Push to the hub after the commit.
        commit_first: Return after the commit, whatever the options of the saver say.
        in_use: Checkpoints that are not to be deleted.
        own: The checkpoints that this run has saved before, the oldest first.
    """
    # First, because the state that is saved below may name the last checkpoint as the best.
    saver.finish()
    if trainer.hp_search_backend is None and trial is None:
        trainer.store_flos()
    run_dir = Path(trainer._get_output_dir(trial=trial))
    path = run_dir / NAMES.name(trainer.state.global_step)
    _note_best(trainer, run_dir, path)
    is_first = trainer.is_world_process_zero()
    text = deciding_ranks().settle("prepare", lambda: _prepare(trainer, path, saver) if is_first else "")
    writers.write(trainer, path, hf_weights=hf_weights)
    optimizer = None if trainer.args.save_only_model else bare_optimizer(trainer)
    state = _state_of(trainer, optimizer, text if is_first else None)
    saver.save(
        state,
        path,
        # An optimizer with a `train` method (a schedule-free one) also changes parameters between steps, when training
        # goes on after an evaluation. Its state and parameters are copied before training goes on.
        optimizers=[] if optimizer is None or hasattr(optimizer, "train") else [optimizer],
        changed_by_forward=renormed_weights([model_of(trainer)]),
        diverging=list(_diverging_in(trainer, optimizer, state)),
        # The Trainer begins an upload on this thread, and the upload reads the files.
        blocking=True if push or commit_first or not trainer.is_in_train else None,
    )
    if is_first:
        saver.after_commit(partial(shutil.rmtree, path.with_name(f"{path.name}.replaced"), ignore_errors=True))
        saver.after_commit(partial(_attempt, partial(publish_state, path, text, sync=saver.options.sync_files)))
    limit = trainer.args.save_total_limit
    if is_first and limit is not None and limit > 0:
        keep = [path, *in_use]
        if trainer.state.best_model_checkpoint is not None:
            keep.append(Path(trainer.state.best_model_checkpoint))
        saver.after_commit(partial(_attempt, partial(rotate, run_dir, limit, keep, own=[*own, path])))
    if push:
        # The upload lists the run's directory in the background. If a checkpoint vanished meanwhile, the upload would
        # fail, which the Trainer does not notice.
        trainer._push_from_checkpoint(str(path))
    if commit_first:
        # Without this barrier, a callback on another rank could read files that rank 0 has not written yet.
        deciding_ranks().barrier()
    return path


def _prepare(trainer: Trainer, path: Path, saver: Saver) -> str:
    """Make room at ``path``, and return the Trainer's state as its JSON file holds it. Runs on rank 0."""
    state: Any = trainer.state
    exported: list[Any] = [*trainer.callback_handler.callbacks, trainer.control]
    # The constructor knows how several callbacks of one class are kept.
    stateful: list[Any] = [one for one in exported if isinstance(one, ExportableState)]
    fresh: Any = TrainerState(stateful_callbacks=stateful)
    state.stateful_callbacks = {**(state.stateful_callbacks or {}), **fresh.stateful_callbacks}
    text = json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True) + "\n"
    if is_stock(path) or has_stock_files(path):
        # Files of stock's checkpoint must not be taken for those of the new checkpoint.
        aside = path.with_name(f"{path.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    make_directory(path, sync=saver.options.sync_files)
    forget_state(path)
    # Weights of another save must not stand beside the new checkpoint.
    for weights in path.glob("*.safetensors*"):
        weights.unlink()
    return text


def _attempt(follow_up: Callable[[], None]) -> None:
    """Run a follow-up of a commit, and log its OSError: the checkpoint exists, and one rank must not stop alone."""
    try:
        follow_up()
    except OSError:
        log.warning("What was to follow a save that is committed failed", exc_info=True)


def _note_best(trainer: Trainer, run_dir: Path, path: Path) -> None:
    """Keep the path of the best checkpoint in the Trainer's state; it may be the one that is about to be saved."""
    state = trainer.state
    if trainer.args.save_strategy == SaveStrategy.NO or not state.best_global_step:
        return
    best = run_dir / NAMES.name(state.best_global_step)
    # One look for all: at the end, ranks load the best model together or not at all.
    if best == path or deciding_ranks().all_reduce(
        "look", lambda: None, lambda _: is_committed(best) or is_stock(best)
    ):
        state.best_model_checkpoint = str(best)


def _diverging_in(trainer: Trainer, optimizer: Optimizer | None, state: dict[str, Any]) -> Iterator[KeyPath]:
    """Yield the paths of values that ranks may hold with different contents: the stock Trainer saves rank 0's."""
    if deciding_ranks().world_size == 1:
        return
    optimizers = [] if optimizer is None else [((OPTIMIZER,), optimizer)]
    yield from Replicas([trainer.model_wrapped]).diverging([((MODEL,), state[MODEL])], optimizers)


def _state_of(trainer: Trainer, optimizer: Optimizer | None, text: str | None) -> dict[str, Any]:
    """Collect what is saved. The Trainer's own state is in rank 0's alone."""
    rest: dict[str, Any] = {} if text is None else {STATE: text}
    model = model_of(trainer)
    state: dict[str, Any] = {MODEL: only_adapters(model, get_model_state_dict(model)), TRAINER: rest}
    if optimizer is not None:
        state[OPTIMIZER] = OptimizerState(model, [optimizer])
        state[RANDOM] = RandomState()
        # Each is serialised as one value, so that a load needs no knowledge of its keys.
        bound = {SCHEDULER: scheduler_of(trainer).state_dict()}
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None:
            bound[SCALER] = scaler.state_dict()
        warn_of_unloadable(bound, "DCPCallback(weights_only=False)", are_pickled=True)
        rest.update({name: dump_value(value).getvalue() for name, value in bound.items()})
    return state
