"""`DCPCallback`: what a user adds to a Trainer, and what happens in place of the Trainer's methods because of it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils.import_utils import is_sagemaker_mp_enabled, is_torch_xla_available

from dcp_plugins.errors import CorruptCheckpointError, listing
from dcp_plugins.format.trust import SafeGlobal, check_safe_globals
from dcp_plugins.manager import SaveOptions, Saver, is_committed
from dcp_plugins.manager.agreement import deciding_ranks
from dcp_plugins.manager.options import Asynchronous
from dcp_plugins.plan.unloadable import loaded_with
from dcp_plugins.transformers import load, seam, stock
from dcp_plugins.transformers.layout import NAMES, find_checkpoint, forget_states_but, later_checkpoints, restore_state
from dcp_plugins.transformers.listeners import readers_of
from dcp_plugins.transformers.save import save_checkpoint
from dcp_plugins.transformers.unwrapped import model_of
from dcp_plugins.transformers.writers import Writers
from dcp_plugins.user_warnings import warn_user

__all__ = ["DCPCallback"]

log = logging.getLogger(__name__)


class DCPCallback(TrainerCallback):
    """Lets a Trainer save and resume through this package's engine.

    One callback serves one Trainer at a time. The arguments that `SaveOptions` has, too, go before ``options``.

    Args:
        options: How to save; by default in the foreground.
        asynchronous: "thread" or "process" write while training goes on; "off" before it does.
        thread_count: Number of I/O threads of each rank.
        sync_files: Whether files are synced before the commit.
        overlap_staging: Whether a save in the background copies parameters while the next step is computed.
        hf_weights: Let each checkpoint also hold what ``from_pretrained`` loads: weights as safetensors, configuration,
            tokenizer. They are written before training goes on, whatever ``asynchronous`` says. By default only where
            the Trainer pushes checkpoints to the hub.
        commit_before_on_save: Let a save in the background wait for its commit before the Trainer calls ``on_save`` of
            its callbacks. By default it waits where a callback may read the checkpoint's files there, such as one that
            uploads them; a line in the log names that callback.
        weights_only: Read schedulers' and scalers' states as plain data. False unpickles them, which can run code: only
            for checkpoints that you trust.
        safe_globals: Classes of yours that these states may have all the same, beside those of
            ``torch.serialization.add_safe_globals``.
    """

    def __init__(
        self,
        options: SaveOptions = SaveOptions(),  # noqa: B008 - frozen
        *,
        asynchronous: Asynchronous | None = None,
        thread_count: int | None = None,
        sync_files: bool | None = None,
        overlap_staging: bool | None = None,
        hf_weights: bool | None = None,
        commit_before_on_save: bool | None = None,
        weights_only: bool = True,
        safe_globals: Iterable[SafeGlobal] = (),
    ) -> None:
        given: dict[str, Any] = {
            "asynchronous": asynchronous,
            "thread_count": thread_count,
            "sync_files": sync_files,
            "overlap_staging": overlap_staging,
        }
        self.options = dataclasses.replace(
            options, **{name: value for name, value in given.items() if value is not None}
        )
        self.hf_weights = hf_weights
        self.commit_before_on_save = commit_before_on_save
        self.weights_only = weights_only
        self.safe_globals = check_safe_globals(safe_globals)
        self.saver = Saver(self.options)
        self.writers = Writers()
        self._saved_step: int | None = None
        self._saved: list[Path] = []
        self._pushed: list[Path] = []
        self._has_hinted = False
        self._resuming: Path | None = None
        self._loaded: set[str] = set()
        seam.install(_REPLACEMENTS, callback_of)

    def writes_hf_weights(self, args: TrainingArguments) -> bool:
        """Whether checkpoints of this run hold weights for ``from_pretrained``."""
        return pushes_checkpoints(args) if self.hf_weights is None else self.hf_weights

    # Events of a callback. They only check that the Trainer calls the methods that it called in the tested versions.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._resuming is None:
            return
        if "model" not in self._loaded:
            raise _moved(f"train() did not load the model of {self._resuming} through Trainer._load_from_checkpoint")
        if "optimizer" not in self._loaded:
            # No error: a subclass may choose to begin with a fresh optimizer.
            warn_user(
                f"DCPCallback: the optimizer's state in {self._resuming} was not loaded, as a subclass of Trainer"
                " overrides _load_optimizer_and_scheduler and did not call super()."
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._saved_step != state.global_step:
            raise _moved(f"the save at step {state.global_step} did not go through Trainer._save_checkpoint")

    # In place of the Trainer's methods.

    def train(
        self,
        trainer: Trainer,
        original: Callable[..., Any],
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        _refuse_unsupported(trainer)
        self.saver.wait()
        path, is_ours = _agreed_checkpoint(trainer, resume_from_checkpoint)
        self._resuming = path if is_ours else None
        self._loaded = set()
        self._saved_step = None
        self._saved = []
        try:
            result = original(None if path is None else str(path), *args, **kwargs)
        except BaseException:
            self._give_up()
            raise
        self.saver.close()
        return result

    def _give_up(self) -> None:
        """Let the save in flight come to its end; what it fails with must not hide why training failed."""
        try:
            self.saver.close()
        except Exception:  # the exception that is being raised goes first
            log.exception("The last save in the background failed, too: its checkpoint does not exist")

    def save(self, trainer: Trainer, original: Callable[..., Any], model: Any, trial: Any) -> None:
        uploads = getattr(trainer, "push_in_progress", None)
        if uploads is None or uploads.is_done():
            self._pushed = []
        push = pushes_checkpoints(trainer.args)
        hf_weights = self.writes_hf_weights(trainer.args)
        if not self._saved and trainer.is_world_process_zero():
            self._hint(trainer, Path(trainer._get_output_dir(trial=trial)) / NAMES.name(trainer.state.global_step))
        with loaded_with(weights_only=self.weights_only, safe_globals=self.safe_globals):
            path = save_checkpoint(
                trainer,
                self.saver,
                self.writers,
                trial=trial,
                hf_weights=hf_weights,
                push=push,
                commit_first=self._commits_first(trainer),
                in_use=self._pushed,
                own=self._saved,
            )
        if push:
            self._pushed = [*self._pushed, path]
        self._saved = [*(other for other in self._saved if other != path), path]
        self._saved_step = trainer.state.global_step

    def _commits_first(self, trainer: Trainer) -> bool:
        """Agree whether a save is committed before the Trainer calls ``on_save``."""
        if self.options.asynchronous == "off" or self.commit_before_on_save is not None:
            return bool(self.commit_before_on_save)
        # Ranks must decide alike, and a callback may be on one rank only.
        readers = readers_of(trainer)
        commits_first = deciding_ranks().any_of("on_save", [bool(readers)])[0]
        if readers and not self._saved:
            log.warning(
                "DCPCallback: each save waits for its commit, because %s may read the checkpoint's files in on_save. If"
                " not, DCPCallback(commit_before_on_save=False) lets training go on meanwhile",
                ", ".join(readers),
            )
        return commits_first

    def _hint(self, trainer: Trainer, path: Path) -> None:
        """Warn of what users would find out too late. Runs before a run's first save, on the main process."""
        later = later_checkpoints(path)
        if later:
            log.warning(
                "%s is saved beside later steps of an earlier run: %s. save_total_limit deletes these first, and until"
                " then resume_from_checkpoint=True takes the last one. Give this run another output_dir, or move them"
                " away, unless that is what you want",
                path,
                listing(other.name for other in later),
            )
        if self.hf_weights is None and not self.writes_hf_weights(trainer.args) and not self._has_hinted:
            self._has_hinted = True
            if hasattr(model_of(trainer), "save_pretrained"):
                log.warning(
                    "%s is for resuming: from_pretrained cannot load it. DCPCallback(hf_weights=True) writes weights,"
                    " configuration and tokenizer into each checkpoint, too; False only hides this hint",
                    path,
                )

    def load_model(
        self, trainer: Trainer, original: Callable[..., Any], resume_from_checkpoint: str, model: Any = None
    ) -> None:
        directory = _ours_or(stock.fsdp_model_directory, resume_from_checkpoint)
        if directory is None:
            original(resume_from_checkpoint, model)
        else:
            self._load_model(model_of(trainer) if model is None else model, directory)
        self._loaded.add("model")

    def _load_model(self, model: Any, directory: Path) -> None:
        load.load_model(model, directory, weights_only=self.weights_only, safe_globals=self.safe_globals)

    def load_optimizer_and_scheduler(
        self, trainer: Trainer, original: Callable[..., Any], checkpoint: str | None
    ) -> None:
        directory = _ours_or(stock.fsdp_optimizer_directory, checkpoint)
        if checkpoint is None or directory is None:
            original(checkpoint)
        elif directory == Path(checkpoint):
            load.load_optimizer_and_scheduler(
                trainer, directory, weights_only=self.weights_only, safe_globals=self.safe_globals
            )
        else:
            stock.load_fsdp_optimizer_and_scheduler(trainer, Path(checkpoint), directory)
        self._loaded.add("optimizer")

    def load_scaler(self, trainer: Trainer, original: Callable[..., Any], checkpoint: str | None) -> None:
        # For a checkpoint of ours, the scaler was loaded with the scheduler.
        if checkpoint is None or not is_committed(checkpoint):
            original(checkpoint)

    def load_random_state(self, trainer: Trainer, original: Callable[..., Any], checkpoint: str | None) -> None:
        directory = _ours_or(lambda _: None, checkpoint)
        if directory is None:
            original(checkpoint)
        else:
            load.load_random_state(directory)

    def load_best_model(self, trainer: Trainer, original: Callable[..., Any]) -> None:
        best = trainer.state.best_model_checkpoint
        directory = _ours_or(stock.fsdp_model_directory, best)
        if directory is None:
            original()
            return
        log.info("Loading the best model from %s (score: %s)", best, trainer.state.best_metric)
        self._load_model(model_of(trainer), directory)

    def finalize(self, trainer: Trainer, original: Callable[..., Any], trial: Any, *args: Any, **kwargs: Any) -> Any:
        # The best model may be in flight, and with save_total_limit=1 the Trainer deletes all but that.
        self.saver.finish()
        best = trainer.state.best_model_checkpoint
        if best is not None and trainer.args.save_total_limit == 1 and trainer.is_world_process_zero():
            forget_states_but(Path(trainer._get_output_dir(trial)), Path(best))
        return original(trial, *args, **kwargs)


def callback_of(trainer: Trainer) -> DCPCallback | None:
    """Return the Trainer's own `DCPCallback`, or None.

    Raises:
        ValueError: It has several, which would each write the same checkpoints.
    """
    handler = getattr(trainer, "callback_handler", None)
    found = [] if handler is None else [one for one in handler.callbacks if isinstance(one, DCPCallback)]
    if len(found) > 1:
        raise ValueError(f"expected one DCPCallback in a Trainer's callbacks, got {len(found)}: remove the others")
    return found[0] if found else None


def pushes_checkpoints(args: TrainingArguments) -> bool:
    """Whether saves, and not only the end of the training, push something to the hub."""
    return bool(args.push_to_hub) and args.hub_strategy != HubStrategy.END


_REPLACEMENTS: dict[str, seam.Replacement] = {
    "train": DCPCallback.train,
    "_save_checkpoint": DCPCallback.save,
    "_load_from_checkpoint": DCPCallback.load_model,
    "_load_optimizer_and_scheduler": DCPCallback.load_optimizer_and_scheduler,
    "_load_scaler": DCPCallback.load_scaler,
    "_load_rng_state": DCPCallback.load_random_state,
    "_load_best_model": DCPCallback.load_best_model,
    "_finalize_training": DCPCallback.finalize,
    "save_model": lambda callback, *args, **kwargs: callback.writers.save_model(*args, **kwargs),
    "_save": lambda callback, *args, **kwargs: callback.writers.save_weights(*args, **kwargs),
    "_save_optimizer_and_scheduler": lambda callback, *args, **kwargs: callback.writers.save_optimizer_and_scheduler(
        *args, **kwargs
    ),
}


def _ours_or(find: Callable[[Path], Path | None], checkpoint: str | None) -> Path | None:
    """Return the directory to read a checkpoint from: itself if it is ours, or what is found in it; rank 0 looks.

    One look for all: file systems may show a file to one node later than to another, and ranks must not part.
    """
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    return deciding_ranks().all_reduce("look", lambda: None, lambda _: path if is_committed(path) else find(path))


def _agreed_checkpoint(trainer: Trainer, requested: str | bool | None) -> tuple[Path | None, bool]:
    """Let rank 0 choose the checkpoint to resume from, and tell whether it is ours, so that all ranks take the same."""

    def choose() -> tuple[Path | None, bool, Exception | None]:
        try:
            path = find_checkpoint(requested, str(trainer.args.output_dir))
            if path is not None:
                restore_state(path)
            return path, path is not None and is_committed(path), None
        except (ValueError, OSError, CorruptCheckpointError) as exc:
            # These errors are for the user: every rank raises them as they are.
            return None, False, exc

    path, is_ours, failure = deciding_ranks().all_reduce("resume", lambda: None, lambda _: choose())
    if failure is not None:
        raise failure
    return path, is_ours


def _refuse_unsupported(trainer: Trainer) -> None:
    args = trainer.args
    unsupported = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "SageMaker model parallelism": is_sagemaker_mp_enabled(),
        "PyTorch/XLA": is_torch_xla_available(),
        "save_on_each_node=True on several nodes": args.save_on_each_node and args.world_size > _local_world_size(args),
    }
    found = [name for name, is_used in unsupported.items() if is_used]
    if found:
        raise ValueError(
            f"DCPCallback saves plain, DDP and FSDP models into a directory that all nodes share, but this Trainer uses"
            f" {', '.join(found)}: remove the callback to save with the Trainer's own writers."
        )


def _local_world_size(args: TrainingArguments) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))


def _moved(what: str) -> RuntimeError:
    return RuntimeError(
        f"DCPCallback: {what}. It works with {seam.TESTED}, and with subclasses of Trainer whose overridden methods"
        " call super()."
    )
