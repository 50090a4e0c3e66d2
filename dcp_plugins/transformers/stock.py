"""The stock Trainer's checkpoints: reading the sharded ones that it wrote, and writing one of ours as it would.

Its plain ones (``model.safetensors``, ``optimizer.pt``) the Trainer's own loaders read, with ``weights_only``. Under
FSDP it writes DCP directories, ``pytorch_model_fsdp_0`` and ``optimizer_0``: these our engine reads, whatever the
parallelism.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from dcp_plugins.manager import OptimizerState, RandomState, is_committed, load_state, verify_checkpoint
from dcp_plugins.manager.agreement import deciding_ranks
from dcp_plugins.storage.whole_files import read_torch_file
from dcp_plugins.transformers.layout import OPTIMIZER, restore_state
from dcp_plugins.transformers.load import load_model, load_optimizer_and_scheduler, load_random_state, names_in
from dcp_plugins.transformers.unwrapped import bare_optimizer, model_of, scheduler_of

__all__ = [
    "fsdp_model_directory",
    "fsdp_optimizer_directory",
    "load_fsdp_optimizer_and_scheduler",
    "write_stock_checkpoint",
]


def fsdp_model_directory(checkpoint: Path) -> Path | None:
    """Return where a stock checkpoint keeps a sharded model, or None."""
    directory = checkpoint / f"{FSDP_MODEL_NAME}_0"
    return directory if is_committed(directory) else None


def fsdp_optimizer_directory(checkpoint: Path) -> Path | None:
    """Return where a stock checkpoint keeps a sharded optimizer's state, or None."""
    directory = checkpoint / f"{OPTIMIZER_NAME}_0"
    return directory if is_committed(directory) else None


def load_fsdp_optimizer_and_scheduler(trainer: Trainer, checkpoint: Path, directory: Path) -> None:
    """Load the sharded optimizer's state that the stock Trainer wrote, and the scheduler's beside it."""
    load_state({OPTIMIZER: OptimizerState(model_of(trainer), [bare_optimizer(trainer)])}, directory)
    scheduler_of(trainer).load_state_dict(read_torch_file(checkpoint / SCHEDULER_NAME))


def write_stock_checkpoint(trainer: Trainer, checkpoint: str | Path, folder: str | Path) -> None:
    """Write a checkpoint of ours as the stock Trainer would have: to go back, or to hand it to somebody without us.

    ``folder`` then holds ``model.safetensors`` (or adapters), ``optimizer.pt``, ``scheduler.pt``, the random states and
    ``trainer_state.json``, and a Trainer without a callback resumes from it. Under FSDP it holds what the FSDP
    configuration says. Of a checkpoint saved with ``save_only_model`` it holds the weights and ``trainer_state.json``.
    The Trainer's model and optimizer are loaded with the checkpoint's state on the way.

    Args:
        trainer: Made as for the training, but not trained. It may have a `DCPCallback`. Every rank calls this.
        checkpoint: A committed one of `DCPCallback`.
        folder: Made if it does not exist. Name it ``checkpoint-<step>`` for ``resume_from_checkpoint=True``.

    Raises:
        ValueError: ``folder`` is a checkpoint of ours.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    ranks = deciding_ranks()
    if ranks.all_reduce("look", lambda: None, lambda _: is_committed(folder)):
        raise ValueError(
            f"expected a folder for the stock Trainer's files alone, but {folder} is a checkpoint of DCPCallback:"
            " name another"
        )
    ranks.settle("verify", lambda: verify_checkpoint(checkpoint))
    ranks.settle("restore state", lambda: restore_state(checkpoint) if ranks.is_coordinator else None)
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if not trainer.is_fsdp_enabled:
        load_model(model_of(trainer), checkpoint)
    prepare: Any = trainer._prepare_for_training
    prepare(state.max_steps, None, None)
    if trainer.is_fsdp_enabled:
        load_model(model_of(trainer), checkpoint)
    trainer.save_model(str(folder), _internal_call=True)
    if OPTIMIZER in names_in(checkpoint):
        load_optimizer_and_scheduler(trainer, checkpoint, weights_only=True)
        trainer._save_optimizer_and_scheduler(str(folder))
        trainer._save_scaler(str(folder))
        current = RandomState().state_dict()
        load_random_state(checkpoint)
        trainer._save_rng_state(str(folder))
        RandomState().load_state_dict(current)
    if trainer.is_world_process_zero():
        shutil.copyfile(checkpoint / TRAINER_STATE_NAME, folder / TRAINER_STATE_NAME)
    ranks.barrier()
