"""One module or one file out of a directory; what else than a model is in a checkpoint; what ends a run early."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from dcp_plugins.errors import CheckpointNotFoundError, UnloadableValueWarning, UnsupportedValueError
from dcp_plugins.lightning import (
    DCPCheckpointIO,
    DCPDDPStrategy,
    DCPFSDPStrategy,
    consolidate,
    is_committed,
    load_from_checkpoint,
)
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.fabrics import Run
from tests.adapters.lightning.test_async import At, every_step
from tests.adapters.lightning.trainers import Regression, Ticks, digest, fit, trainer, whole_state


class Configured(Regression):
    """Hyper-parameters, and a hook that looks at what is loaded."""

    def __init__(self, lr: float = 0.01, name: str = "default") -> None:
        super().__init__(lr)
        self.save_hyperparameters()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded_at = checkpoint["global_step"]


class Choice:
    """An object that is no plain data."""


class Data(pl.LightningDataModule):
    """Knows how many batches it has given."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.given = 0

    def train_dataloader(self) -> Any:
        return Ticks(100)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.given += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]


class Counter(Callback):
    """Has state of its own."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


def save_with_everything(flag: str, path: Path) -> Any:
    data, counter = Data(size=3), Counter()
    module = Configured(lr=0.02, name="mine")
    runner = trainer(flag, devices=2, steps=3, callbacks=[counter])
    runner.fit(module, datamodule=data)
    runner.save_checkpoint(path)
    return whole_state(module)


def resume_with_everything(flag: str, path: Path) -> tuple[int, int]:
    data, counter = Data(), Counter()
    runner = trainer(flag, devices=2, steps=5, callbacks=[counter])
    runner.fit(Configured(), datamodule=data, ckpt_path=path)
    return data.given, counter.batches


def resume_under_stock_ddp(path: Path) -> Any:
    return fit(DDPStrategy(), devices=2, steps=5, resume=path, module=Configured()).losses


@pytest.mark.parametrize("flag", ["dcp_fsdp", "dcp_fsdp2"])
def test_modules_data_and_callbacks_come_back_from_a_directory(
    tmp_path: Path, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    saved = run_ranks(2, save_with_everything, flag, path)[0]
    weights = {name: value for name, value in saved.items() if name.startswith(".model")}

    # Data modules and callbacks, on resuming.
    assert run_ranks(2, resume_with_everything, flag, path) == [(5, 5)] * 2

    # A module and a data module, without a trainer.
    module = load_from_checkpoint(Configured, path)
    assert dict(module.hparams) == {"lr": 0.02, "name": "mine"}
    assert module.loaded_at == 3
    assert digest({"model": module.state_dict()}) == weights
    assert load_from_checkpoint(Configured, path, name="another").hparams["name"] == "another"
    data = load_from_checkpoint(Data, path)
    assert (data.hparams["size"], data.given) == (3, 3)

    # One file: ours, and by Lightning's own tool where it knows the model's name.
    consolidate(path, tmp_path / "one.ckpt")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        consolidate(path, tmp_path / "one.ckpt")
    files = [tmp_path / "one.ckpt"]
    if flag == "dcp_fsdp":
        files.append(tmp_path / "tool.ckpt")
        tool = "lightning.pytorch.utilities.consolidate_checkpoint"
        monkeypatch.setattr("sys.argv", [tool, str(path), "--output_file", str(files[1])])
        runpy.run_module(tool, run_name="__main__")
    for file in files:
        again = Configured.load_from_checkpoint(file)
        assert dict(again.hparams) == {"lr": 0.02, "name": "mine"}
        assert digest({"model": again.state_dict()}) == weights
        assert digest({"model": load_from_checkpoint(Configured, file).state_dict()}) == weights
        for losses in run_ranks(2, resume_under_stock_ddp, file):
            assert sorted(losses) == [3, 4]


def save_flat(path: Path) -> list[str]:
    strategy = DCPFSDPStrategy(use_orig_params=False)
    fit(strategy, devices=2, steps=3, save_to=path)
    return [name for name, _ in Regression().named_parameters()]


def save_under_stock_ddp(path: Path) -> None:
    fit(DDPStrategy(), devices=2, steps=3, save_to=path)


def resume(strategy: Any, path: Path) -> Any:
    return fit(strategy, devices=2, steps=5, resume=path).losses


def test_optimizer_state_of_flat_parameters_is_consolidated_in_the_order_of_the_model(tmp_path: Path) -> None:
    names = run_ranks(2, save_flat, tmp_path / "a.ckpt")[0]
    consolidate(tmp_path / "a.ckpt", tmp_path / "one.ckpt")
    assert torch.load(tmp_path / "one.ckpt")["optimizer_states"][0]["param_groups"][0]["params"] == names
    expected = run_ranks(2, resume, DCPFSDPStrategy(use_orig_params=False), tmp_path / "a.ckpt")[0]
    # Stock DDP goes by the order, and writes numbers, of which ours has to know the order.
    assert run_ranks(2, resume, DDPStrategy(), tmp_path / "one.ckpt")[0] == pytest.approx(expected, rel=1e-5)
    run_ranks(2, save_under_stock_ddp, tmp_path / "stock.ckpt")
    flat = run_ranks(2, resume, DCPFSDPStrategy(use_orig_params=False), tmp_path / "stock.ckpt")[0]
    assert flat == pytest.approx(run_ranks(2, resume, DDPStrategy(), tmp_path / "stock.ckpt")[0], rel=1e-5)


def test_a_directory_of_fabrics_becomes_a_dict_with_the_users_entries(tmp_path: Path) -> None:
    run_ranks(2, save_under_fabric, tmp_path / "a")
    consolidate(tmp_path / "a", tmp_path / "a.pt")
    whole = torch.load(tmp_path / "a.pt")
    assert sorted(whole) == ["losses", "model", "optimizer", "step"]
    assert whole["step"] == 2
    assert sorted(os.listdir(tmp_path)) == ["a", "a.pt"]


def save_under_fabric(path: Path) -> None:
    Run("dcp_fsdp2").train(2).save(path)


def test_what_is_no_checkpoint_or_no_plain_data_is_refused(tmp_path: Path) -> None:
    for act in (lambda: load_from_checkpoint(Regression, tmp_path), lambda: consolidate(tmp_path, tmp_path / "file")):
        with pytest.raises(CheckpointNotFoundError, match="has no .metadata"):
            act()
    state = Regression().state_dict()
    meta = {"hyper_parameters": {"lr": Choice()}, "pytorch-lightning_version": pl.__version__, "global_step": 1}
    with pytest.warns(UnloadableValueWarning, match="hyper_parameters.lr"):
        DCPCheckpointIO().save_checkpoint({"state_dict": state, **meta}, tmp_path / "a")
    with pytest.raises(UnsupportedValueError, match="not plain data.*Choice"):
        load_from_checkpoint(Regression, tmp_path / "a")
    for options in ({"weights_only": False}, {"safe_globals": [Choice]}):
        trusted = load_from_checkpoint(Regression, tmp_path / "a", **options)
        assert isinstance(trusted.hparams["lr"], Choice)


# -- OnExceptionCheckpoint -------------------------------------------------------------------------------------------


def break_off(flag: str, folder: Path) -> tuple[str, list[int]]:
    def stop(trainer: pl.Trainer) -> None:
        raise ZeroDivisionError("in training")

    callbacks = [every_step(folder / "steps", save_top_k=1), OnExceptionCheckpoint(folder), At(3, stop)]
    raised = ""
    try:
        fit(flag, devices=2, steps=6, callbacks=callbacks)
    except ZeroDivisionError as exc:
        raised = str(exc)
    # Lightning resumes from it by itself; the end of a fit that succeeds deletes it.
    module = fit(flag, devices=2, steps=6, callbacks=[every_step(folder / "steps"), OnExceptionCheckpoint(folder)])
    return raised, sorted(module.losses)


@pytest.mark.parametrize("flag", ["dcp_ddp", "dcp_fsdp2_async"])
def test_a_checkpoint_on_an_exception_is_committed_and_resumed_from(tmp_path: Path, flag: str) -> None:
    for raised, steps in run_ranks(2, break_off, flag, tmp_path):
        assert raised == "in training"
        assert steps == [3, 4, 5]
    assert os.listdir(tmp_path) == ["steps"]


def break_off_without_a_place(folder: Path) -> str:
    def stop(trainer: pl.Trainer) -> None:
        raise ZeroDivisionError("in training")

    try:
        fit("dcp_async", devices=1, steps=6, callbacks=[OnExceptionCheckpoint(folder / "file" / "x"), At(3, stop)])
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return ""


def test_a_checkpoint_that_fails_does_not_hide_the_exception(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory can be made below this")
    assert run_ranks(1, break_off_without_a_place, tmp_path) == ["ZeroDivisionError: in training"]


def test_what_a_kill_left_of_a_checkpoint_on_an_exception_is_not_resumed(tmp_path: Path) -> None:
    with_warning, _ = run_ranks(2, resume_from_the_uncommitted, tmp_path)
    assert with_warning == [2, 3]
    assert is_committed(tmp_path / "step=4.ckpt")


def break_off_alone(folder: Path) -> str:
    def stop(trainer: pl.Trainer) -> None:
        if trainer.global_rank == 1:
            raise ZeroDivisionError("in training")

    strategy = DCPDDPStrategy(asynchronous=True)
    strategy._interruption_timeout_seconds = 0.5
    try:
        fit(strategy, devices=2, steps=6, callbacks=[OnExceptionCheckpoint(folder), At(3, stop)])
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return ""


def test_an_exception_on_one_rank_alone_is_raised_without_waiting_for_the_others(tmp_path: Path) -> None:
    other, failed = run_ranks(2, break_off_alone, tmp_path, collective_timeout_seconds=20)
    assert failed == "ZeroDivisionError: in training"
    assert other  # it was in a collective that nobody joins
    assert not is_committed(tmp_path / "on_exception.ckpt")


def resume_from_the_uncommitted(folder: Path) -> list[int]:
    callbacks = [every_step(folder, save_top_k=-1), OnExceptionCheckpoint(folder)]
    fit("dcp_ddp", devices=2, steps=2, callbacks=[callbacks[0]])
    (folder / "on_exception.ckpt").mkdir(exist_ok=True)
    return sorted(fit("dcp_ddp", devices=2, steps=4, callbacks=callbacks).losses)
