"""The same short run through every surface of the package: saved after three steps, resumed by fresh objects.

A surface is a function that gets a directory and what makes a model's optimizer, and returns the model after five steps
with an interruption after the third. Models, data and losses are the same on all surfaces.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import dcp_plugins as dcp
from dcp_plugins.manager import CheckpointManager, SaveOptions, run_state
from dcp_plugins.state_dict import StateDictOptions, get_state_dict, set_state_dict

__all__ = ["SURFACES", "Net", "uninterrupted"]

STEPS_BEFORE, STEPS_AFTER = 3, 2

MakeOptimizer = Callable[[nn.Module], Optimizer]
MakeModel = Callable[[], nn.Module]


class Net(nn.Module):
    """Two layers, of which one may never be used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used = nn.Linear(3, 2)
        self.idle = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        return {"loss": self.used(x).pow(2).sum()}


def train(model: nn.Module, optimizer: Any, num_steps: int) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.full((1, 3), 0.1))["loss"].backward()
        optimizer.step()


def uninterrupted(make: MakeOptimizer, make_model: MakeModel = Net) -> nn.Module:
    model = make_model()
    train(model, make(model), STEPS_BEFORE + STEPS_AFTER)
    return model


def _engine(folder: Path, make: MakeOptimizer, make_model: MakeModel, options: StateDictOptions) -> nn.Module:
    model, other = make_model(), make_model()
    optimizer, fresh = make(model), make(other)
    train(model, optimizer, STEPS_BEFORE)
    with _alone():
        state, optimizer_state = get_state_dict(model, optimizer, options=options)
        dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)
        state, optimizer_state = get_state_dict(other, fresh, options=options)
        target = {"model": state, "optimizer": optimizer_state}
        dcp.load(target, checkpoint_id=folder)
    set_state_dict(
        other,
        fresh,
        model_state_dict=target["model"],
        optim_state_dict=target["optimizer"],
        options=options,
    )
    train(other, fresh, STEPS_AFTER)
    return other


def engine(folder: Path, make: MakeOptimizer, make_model: MakeModel = Net) -> nn.Module:
    return _engine(folder, make, make_model, StateDictOptions())


def engine_flat(folder: Path, make: MakeOptimizer, make_model: MakeModel = Net) -> nn.Module:
    return _engine(folder, make, make_model, StateDictOptions(flatten_optimizer_state_dict=True))


def _manager(folder: Path, make: MakeOptimizer, make_model: MakeModel, options: SaveOptions) -> nn.Module:
    model, other = make_model(), make_model()
    optimizer, fresh = make(model), make(other)
    train(model, optimizer, STEPS_BEFORE)
    with CheckpointManager(folder, options=options) as manager:
        manager.save(STEPS_BEFORE, run_state(model=model, optimizers=optimizer))
    with CheckpointManager(folder) as manager:
        assert manager.restore(run_state(model=other, optimizers=fresh)) == STEPS_BEFORE
    train(other, fresh, STEPS_AFTER)
    return other


def manager(folder: Path, make: MakeOptimizer, make_model: MakeModel = Net) -> nn.Module:
    return _manager(folder, make, make_model, SaveOptions())


def manager_async(folder: Path, make: MakeOptimizer, make_model: MakeModel = Net) -> nn.Module:
    return _manager(folder, make, make_model, SaveOptions(asynchronous="thread"))


def accelerate(folder: Path, make: MakeOptimizer, make_model: MakeModel = Net) -> nn.Module:
    from accelerate import Accelerator

    from dcp_plugins.accelerate import enable

    model, other = make_model(), make_model()
    optimizer, fresh = make(model), make(other)
    first = enable(Accelerator(cpu=True))
    model, optimizer = first.prepare(model, optimizer)
    train(model, optimizer, STEPS_BEFORE)
    first.save_state(folder / "c")
    second = enable(Accelerator(cpu=True))
    other, fresh = second.prepare(other, fresh)
    second.load_state(folder / "c")
    train(other, fresh, STEPS_AFTER)
    return other


def fabric(folder: Path, make: MakeOptimizer, make_model: MakeModel = Net) -> nn.Module:
    from lightning.fabric import Fabric

    import dcp_plugins.lightning

    assert dcp_plugins.lightning
    runs = Fabric(accelerator="cpu", devices=1, strategy="dcp")
    runs.launch()
    model, other = make_model(), make_model()
    own, optimizer = runs.setup(model, make(model))
    train(own, optimizer, STEPS_BEFORE)
    runs.save(folder / "c", {"model": own, "optimizer": optimizer})
    theirs, fresh = runs.setup(other, make(other))
    runs.load(folder / "c", {"model": theirs, "optimizer": fresh})
    train(theirs, fresh, STEPS_AFTER)
    return other


def _lightning(folder: Path, make: MakeOptimizer, make_model: MakeModel, strategy: str) -> nn.Module:
    from lightning.pytorch import LightningModule, Trainer

    import dcp_plugins.lightning

    assert dcp_plugins.lightning
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(batch[0])["loss"]

        def configure_optimizers(self) -> Optimizer:
            return make(self.net)

        def train_dataloader(self) -> Any:
            data = torch.utils.data.TensorDataset(torch.full((8, 3), 0.1))
            return torch.utils.data.DataLoader(data, batch_size=1)

    def trainer(max_steps: int) -> Trainer:
        return Trainer(
            max_steps=max_steps,
            strategy=strategy,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = trainer(STEPS_BEFORE)
        first.fit(Module())
        first.save_checkpoint(folder / "c.ckpt")
        module = Module()
        trainer(STEPS_BEFORE + STEPS_AFTER).fit(module, ckpt_path=folder / "c.ckpt")
    return module.net


def lightning(folder: Path, make: MakeOptimizer, make_model: MakeModel = Net) -> nn.Module:
    return _lightning(folder, make, make_model, "dcp")


def lightning_async(folder: Path, make: MakeOptimizer, make_model: MakeModel = Net) -> nn.Module:
    return _lightning(folder, make, make_model, "dcp_async")


def hf_trainer(folder: Path, make: MakeOptimizer, make_model: MakeModel = Net) -> nn.Module:
    from transformers import Trainer, TrainingArguments

    from dcp_plugins.transformers import DCPCallback

    data = [{"x": torch.full((3,), 0.1)} for _ in range(16)]

    def trainer(max_steps: int) -> Trainer:
        model = make_model()
        arguments = TrainingArguments(
            str(folder),
            max_steps=max_steps,
            save_steps=STEPS_BEFORE,
            per_device_train_batch_size=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            logging_strategy="no",
        )
        return Trainer(model, arguments, train_dataset=data, optimizers=(make(model), None), callbacks=[DCPCallback()])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(STEPS_BEFORE).train()
        second = trainer(STEPS_BEFORE + STEPS_AFTER)
        second.train(resume_from_checkpoint=True)
    model = second.model
    assert isinstance(model, nn.Module)
    return model


SURFACES: list[Callable[..., nn.Module]] = [
    engine,
    engine_flat,
    manager,
    manager_async,
    accelerate,
    fabric,
    lightning,
    lightning_async,
    hf_trainer,
]


@contextmanager
def _alone() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
