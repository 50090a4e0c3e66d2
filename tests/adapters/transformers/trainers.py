"""Trainers small enough to run many of: a GPT-2 of some thousand parameters, with dropout, on random tokens."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from dcp_plugins.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from dcp_plugins.transformers import DCPCallback

STEPS = 8
VOCABULARY = 32


class Tokens(Dataset[dict[str, Tensor]]):
    """Random sequences; 40 of them, so that runs end in an epoch's middle."""

    def __init__(self, length: int = 40) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(VOCABULARY, (8,), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


class StopAt(TrainerCallback):
    """Ends the training early, as an interruption that leaves the schedule as it is."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            control.should_training_stop = True


class Counting(TrainerCallback, ExportableState):
    """A callback with a state of its own."""

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.count = start

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"start": self.start}, "attributes": {"count": self.count}}


class Digests(TrainerCallback):
    """Notes the weights at every save, and weights and optimizer when training begins."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, str]] = {}
        self.begun_with: dict[str, str] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun_with = digest(kwargs["model"], kwargs["optimizer"].optimizer)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.at[state.global_step] = digest(kwargs["model"])


def tiny(**overrides: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = {"vocab_size": VOCABULARY, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0, **overrides))


def arguments(folder: Path | str, **overrides: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 40,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
    }
    return TrainingArguments(**{**options, **overrides})


class Quiet(Trainer):
    """Does not print its metrics."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from transformers import PrinterCallback

        self.remove_callback(PrinterCallback)


def trainer(
    folder: Path | str,
    *callbacks: TrainerCallback,
    model: Any = None,
    kind: type[Trainer] = Quiet,
    parts: dict[str, Any] | None = None,
    **overrides: Any,
) -> Trainer:
    args = arguments(folder, **overrides)
    if args.fsdp:
        pretend_to_have_devices()
    data: dict[str, Any] = {"train_dataset": Tokens(), "eval_dataset": Tokens(4), **(parts or {})}
    return kind(model or tiny(), args, callbacks=list(callbacks), **data)


def fit(
    folder: Path | str, *callbacks: TrainerCallback, resume: str | Path | bool | None = None, **overrides: Any
) -> Trainer:
    """Train and return the Trainer; ``resume`` as ``resume_from_checkpoint``."""
    runner = trainer(folder, *callbacks, **overrides)
    runner.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume)
    return runner


def pretend_to_have_devices() -> None:
    """Let Accelerate shard on the CPU: it makes a plan for FSDP only where it has counted several devices."""
    AcceleratorState._reset_state()
    state = PartialState()
    state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    state._shared_state["device"] = torch.device("cpu")


def fsdp(version: int, **config: Any) -> dict[str, Any]:
    """Return the arguments that switch FSDP on."""
    warnings.filterwarnings("ignore", ".*deprecat")
    warnings.filterwarnings("ignore", ".*Multiple backends are registered")
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    settings = {
        "version": version,
        "transformer_layer_cls_to_wrap": ["GPT2Block"],
        "state_dict_type": "SHARDED_STATE_DICT",
        **config,
    }
    if version == 1:
        settings["sync_module_states"] = False  # Accelerate refuses it without a device
    return {"fsdp": True, "fsdp_config": settings}


def losses(runner: Trainer) -> dict[int, tuple[float, float, float]]:
    """Return loss, gradient norm and learning rate by step, of the whole run."""
    return {
        entry["step"]: (entry["loss"], float(entry["grad_norm"]), entry["learning_rate"])
        for entry in runner.state.log_history
        if "loss" in entry
    }


def digest(model: Any, optimizer: Any = None) -> dict[str, str]:
    """Map every tensor of a model, and of an optimizer, to the hash of its bits; every rank calls it."""
    options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
    state = get_model_state_dict(model, options=options)
    if optimizer is not None:
        state = {**state, **get_optimizer_state_dict(model, optimizer, options=options)}
    return {
        name: hashlib.sha256(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def outcome(runner: Trainer) -> tuple[dict[int, tuple[float, float, float]], dict[str, str]]:
    return losses(runner), digest(runner.model)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def files(checkpoint: Path) -> list[str]:
    """List a checkpoint's files, data files as one."""
    return sorted({"data" if path.suffix == ".distcp" else path.name for path in checkpoint.iterdir()})


def die_at_the_commit(*args: Any, **kwargs: Any) -> None:
    raise OSError("no space left on this device")


def saving(callbacks: Sequence[TrainerCallback] = (), **options: Any) -> list[TrainerCallback]:
    return [*callbacks, DCPCallback(**options)]
