"""One small run for each surface of the package: what it saves, and what it loads again.

Each surface has a function that trains a little, saves and returns the state that was saved, and one that loads into
freshly made objects and returns the state that they then have. Both states are made of tensors and plain data. The
models stand here, not with the adapters' tests: a frozen checkpoint must not depend on anything that may change.
"""

from __future__ import annotations

import copy
import os
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dcp_plugins as dcp

__all__ = ["SURFACES", "Surface"]

State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Surface:
    """How a kind of checkpoint is written and read, in a process group of one rank."""

    save: Callable[[Path], State]
    """Saves below a folder, which becomes the current directory, and returns what was saved."""
    load: Callable[[Path], State]
    """Loads what ``save`` left in a folder, and returns what was loaded."""
    framework: str = "torch"
    """Without this module the surface cannot be tried."""


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def batch(step: int) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(step))


def blank(value: Any) -> Any:
    """Return ``value`` with other content in every leaf."""
    if isinstance(value, dict):
        return type(value)((key, blank(item)) for key, item in value.items())
    if isinstance(value, list):
        return [blank(item) for item in value]
    return torch.zeros_like(value) if isinstance(value, Tensor) else "blank"


def random_state() -> list[Any]:
    """Return the states of the generators that a run uses, as plain data."""
    name, keys, *rest = np.random.get_state()
    return [random.getstate(), torch.get_rng_state(), [name, torch.from_numpy(keys.astype("int64")), *rest]]


# -- The engine


def engine_values() -> State:
    numbers = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    return {
        "plain": {"float32": numbers, "bfloat16": numbers.to(torch.bfloat16) / 7, "scalar": torch.tensor(-2)},
        "nested": [{"tensors": [numbers[0], numbers[:, 1]]}, {"deep": {"er": {"x": numbers.t(), "none": None}}}],
        "empty": {"dict": {}, "list": [], "tensor": torch.empty(0, 3)},
        "values": {
            "integers": [0, -1, 2**70],
            "floats": [0.1, float("inf"), -0.0],
            "flags": [True, False, None],
            "text": "gölden \0 text",
            "bytes": b"\0\xff",
            "tuple": (1, ("two", 3.0)),
            "set": {1, 2},
            "complex": 1 - 2j,
            "size": torch.Size([2, 3]),
            "dtype": torch.float8_e5m2,
            "device": torch.device("cpu"),
            "ordered": OrderedDict(b=1, a=2),
        },
        "a.dotted": {"k.e.y": 5},
    }


def save_engine(folder: Path) -> State:
    dcp.save(engine_values(), checkpoint_id="checkpoint")
    return engine_values()


def load_engine(folder: Path) -> State:
    target = blank(engine_values())
    dcp.load(target, checkpoint_id=folder / "checkpoint")
    return target


# -- Hugging Face storage


def hugging_face_values() -> State:
    return {name: value.detach() for name, value in make_model().state_dict().items()}


def save_hugging_face(folder: Path) -> State:
    dcp.save(hugging_face_values(), storage_writer=dcp.HuggingFaceStorageWriter(path="checkpoint"))
    return hugging_face_values()


def load_hugging_face(folder: Path) -> State:
    target = blank(hugging_face_values())
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(path=str(folder / "checkpoint")))
    return target


# -- The manager


class _Run:
    """A model with two optimizers, their schedulers, counters, and random numbers in use."""

    def __init__(self) -> None:
        self.model = make_model()
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(self.model[0].parameters(), lr=0.1),
            torch.optim.SGD([*self.model[1].parameters(), *self.model[2].parameters()], lr=0.05, momentum=0.9),
        ]
        self.schedulers = [torch.optim.lr_scheduler.StepLR(one, 2) for one in self.optimizers]
        self.counters: dict[str, Any] = {"step": 0, "losses": []}

    def train(self, steps: int) -> None:
        for _ in range(steps):
            loss = (
                self.model(batch(self.counters["step"])).square().mean()
                * random.random()
                * torch.rand(())
                * np.random.rand()
            )
            loss.backward()
            for one in [*self.optimizers, *self.schedulers]:
                one.step()
            self.model.zero_grad()
            self.counters["step"] += 1
            self.counters["losses"].append(float(torch.randn(())))

    def to_save(self) -> State:
        from dcp_plugins.manager import run_state

        return run_state(
            model=self.model, optimizers=self.optimizers, schedulers=self.schedulers, counters=self.counters
        )

    def state(self) -> State:
        return {
            "model": dict(self.model.state_dict()),
            "optimizers": [one.state_dict() for one in self.optimizers],
            "schedulers": [one.state_dict() for one in self.schedulers],
            "counters": self.counters,
            "random": random_state(),
        }


def save_manager(folder: Path) -> State:
    from dcp_plugins.manager import CheckpointManager

    random.seed(1)
    np.random.seed(1)
    run = _Run()
    with CheckpointManager("run") as manager:
        run.train(3)
        manager.save(3, run.to_save(), metrics={"loss": 0.25})
    return run.state()


def load_manager(folder: Path) -> State:
    from dcp_plugins.manager import CheckpointManager

    run = _Run()
    with CheckpointManager(folder / "run") as manager:
        assert manager.metrics(3) == {"loss": 0.25}
        assert manager.restore(run.to_save()) == 3
    return run.state()


# -- Lightning


def _lightning_run(folder: Path, *, resume: str | None) -> State:
    import lightning.pytorch as pl

    import dcp_plugins.lightning  # noqa: F401  registers the flags

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"width": 4})
            self.net = make_model()
            self.automatic_optimization = False
            self.begun_with: State = {}

        def training_step(self, ticks: Tensor, batch_idx: int) -> None:  # type: ignore[override]
            optimizers: Any = self.optimizers()
            schedulers: Any = self.lr_schedulers()
            self.manual_backward(self.net(batch(self.global_step)).square().mean())
            for one in [*optimizers, *schedulers]:
                one.step()
            for one in optimizers:
                one.zero_grad()

        def configure_optimizers(self) -> Any:
            optimizers = [
                torch.optim.AdamW(self.net[0].parameters(), lr=0.1),
                torch.optim.SGD([*self.net[1].parameters(), *self.net[2].parameters()], lr=0.05, momentum=0.9),
            ]
            return optimizers, [torch.optim.lr_scheduler.StepLR(one, 2) for one in optimizers]

        def on_train_start(self) -> None:
            self.begun_with = copy.deepcopy(self.state())

        def state(self) -> State:
            return {
                "model": dict(self.state_dict()),
                "optimizers": [one.state_dict() for one in self.trainer.optimizers],
                "schedulers": [one.scheduler.state_dict() for one in self.trainer.lr_scheduler_configs],
                "global_step": self.trainer.global_step,
            }

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = {"answer": 42, "list": [1, (2, 3)]}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            assert checkpoint["mine"] == {"answer": 42, "list": [1, (2, 3)]}
            assert checkpoint["hyper_parameters"] == {"width": 4}

    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy="dcp",
        # Each of two optimizers counts.
        max_steps=6 if resume is None else 8,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(9)), ckpt_path=resume)
    if resume is not None:
        return module.begun_with
    trainer.save_checkpoint("last.ckpt")
    return module.state()


def save_lightning(folder: Path) -> State:
    return _lightning_run(folder, resume=None)


def load_lightning(folder: Path) -> State:
    return _lightning_run(folder, resume=str(folder / "last.ckpt"))


# -- Accelerate


class _Counter:
    """An object of the user's that is registered for checkpointing."""

    def __init__(self) -> None:
        self.counted = 0

    def state_dict(self) -> State:
        return {"counted": self.counted}

    def load_state_dict(self, state: State) -> None:
        self.counted = state["counted"]


class _AcceleratedRun:
    def __init__(self) -> None:
        from accelerate import Accelerator

        from dcp_plugins.accelerate import DCPPlugin, enable

        self.accelerator = Accelerator(cpu=True)
        enable(self.accelerator, DCPPlugin())
        run = _Run()
        self.model = self.accelerator.prepare(run.model)
        self.optimizers = [self.accelerator.prepare(one) for one in run.optimizers]
        self.schedulers = [self.accelerator.prepare(one) for one in run.schedulers]
        self.counter = _Counter()
        self.accelerator.register_for_checkpointing(self.counter)

    def train(self, steps: int) -> None:
        for step in range(steps):
            self.accelerator.backward(self.model(batch(step)).square().mean())
            for one in [*self.optimizers, *self.schedulers]:
                one.step()
            for one in self.optimizers:
                one.zero_grad()
            self.counter.counted += 1

    def state(self) -> State:
        return {
            "model": dict(self.accelerator.unwrap_model(self.model).state_dict()),
            "optimizers": [one.state_dict() for one in self.optimizers],
            "schedulers": [one.state_dict() for one in self.schedulers],
            "counted": self.counter.counted,
            "random": random_state(),
        }


def save_accelerate(folder: Path) -> State:
    random.seed(1)
    np.random.seed(1)
    run = _AcceleratedRun()
    run.train(3)
    run.accelerator.save_state("state")
    return run.state()


def load_accelerate(folder: Path) -> State:
    run = _AcceleratedRun()
    run.accelerator.load_state(str(folder / "state"))
    return run.state()


# -- The HF Trainer


def _trainer_run(folder: str, *, resume: str | None) -> State:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    from dcp_plugins.transformers import DCPCallback

    class Recorder(TrainerCallback):
        """Notes the state of the run when training begins, and at its last step."""

        def __init__(self) -> None:
            self.begun_with: State = {}
            self.ended_with: State = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            self.begun_with = self.note(state, parts)

        def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            self.ended_with = self.note(state, parts)

        def note(self, state: Any, parts: Any) -> State:
            optimizer = parts["optimizer"].optimizer.state_dict()
            return {
                "model": {name: value.clone() for name, value in parts["model"].state_dict().items()},
                "optimizer": {
                    "state": {
                        number: {name: value.clone() for name, value in slots.items()}
                        for number, slots in optimizer["state"].items()
                    },
                    "param_groups": [dict(group) for group in optimizer["param_groups"]],
                },
                "scheduler": {
                    name: value for name, value in parts["lr_scheduler"].state_dict().items() if name != "lr_lambdas"
                },
                "global_step": state.global_step,
            }

    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "n_positions": 4, "n_embd": 4, "n_layer": 1, "n_head": 1}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    tokens = [torch.randint(8, (4,), generator=torch.Generator().manual_seed(row)) for row in range(16)]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=3 if resume is None else 4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=3,
        save_strategy="steps" if resume is None else "no",
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )
    recorder = Recorder()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=[recorder, DCPCallback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return recorder.ended_with if resume is None else recorder.begun_with


def save_trainer(folder: Path) -> State:
    return _trainer_run("run", resume=None)


def load_trainer(folder: Path) -> State:
    return _trainer_run(str(folder / "resumed"), resume=str(folder / "run" / "checkpoint-3"))


SURFACES = {
    "engine": Surface(save_engine, load_engine),
    "hugging_face": Surface(save_hugging_face, load_hugging_face),
    "manager": Surface(save_manager, load_manager),
    "lightning": Surface(save_lightning, load_lightning, "lightning"),
    "accelerate": Surface(save_accelerate, load_accelerate, "accelerate"),
    "trainer": Surface(save_trainer, load_trainer, "transformers"),
}


def run_save(name: str, folder: Path) -> None:
    """Save on a rank; the state that was saved goes into a file beside the checkpoint."""
    _quiet()
    os.chdir(folder)
    torch.save(SURFACES[name].save(folder), "expected.pt")


def run_load(name: str, folder: Path) -> State:
    """Load on a rank."""
    _quiet()
    os.chdir(folder)
    return SURFACES[name].load(folder)


def _quiet() -> None:
    """Frameworks' advice about hardware and workers is no finding of these tests."""
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
