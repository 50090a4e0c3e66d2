"""A subclass of `DCPCheckpointIO` takes part in every save and load; modules without an optimizer are as with stock."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from dcp_plugins.lightning import DCPCheckpointIO, consolidate, is_committed
from tests.adapters.lightning.trainers import Regression, Ticks, digest, fit, trainer


class Signing(DCPCheckpointIO):
    """Adds an entry to what is saved, and another to what is loaded."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        super().save_checkpoint({**checkpoint, "signed": True}, path, storage_options)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return {**super().load_checkpoint(path, map_location, weights_only), "seen": True}


class Reading(Regression):
    """Notes the entries that the plugin has added."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.found = {name: checkpoint.get(name) for name in ("signed", "seen")}


@pytest.mark.parametrize("flag", ["dcp", "dcp_async"])
def test_a_subclass_of_the_plugin_saves_and_loads_in_its_own_way(tmp_path: Path, flag: str) -> None:
    # The second save of a step makes links to the files of the first.
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    fit(flag, devices=1, steps=2, callbacks=[checkpoints], plugins=[Signing()])
    for name in ("step=2.ckpt", "last.ckpt"):
        module = Reading()
        fit(flag, devices=1, steps=3, resume=tmp_path / name, module=module, plugins=[Signing()])
        assert module.found == {"signed": True, "seen": True}, name


class Untrained(BoringModel):
    """Has no optimizer."""

    def configure_optimizers(self) -> Any:
        return None


def test_a_run_without_an_optimizer_is_saved_and_resumed(tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None) -> pl.Trainer:
        runner = trainer("dcp", devices=1, steps=-1, limit_train_batches=2, limit_val_batches=0)
        runner.fit_loop.max_epochs = epochs
        runner.fit(Untrained(), ckpt_path=resume)
        return runner

    run(1, None).save_checkpoint(tmp_path / "a.ckpt")
    assert run(2, tmp_path / "a.ckpt").current_epoch == 2


def test_a_checkpoint_from_before_the_fit_has_the_entries_of_stocks(tmp_path: Path) -> None:
    found = {}
    for flag in ("dcp", "auto"):
        runner = trainer(flag, devices=1, steps=1)
        module = Regression()
        module.trainer = runner
        runner.strategy.connect(module)
        runner.save_checkpoint(tmp_path / flag)
        if flag == "dcp":
            consolidate(tmp_path / flag, tmp_path / "one")
        found[flag] = torch.load(tmp_path / ("one" if flag == "dcp" else flag), weights_only=False)
    assert list(found["dcp"]) == list(found["auto"])
    assert found["dcp"]["optimizer_states"] == []


class Counter(nn.Module):
    """A metric without tensors that are saved."""


def test_entries_of_fabric_without_tensors_are_saved_and_loaded(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", strategy="dcp", devices=1)
    fabric.launch()
    model = fabric.setup_module(nn.Linear(2, 2))
    state = {"model": model, "loss": nn.MSELoss(), "metric": Counter(), "step": 3}
    fabric.save(tmp_path / "a", state)
    assert fabric.load(tmp_path / "a", {**state, "step": 0}) == {}
    assert sorted(fabric.load(tmp_path / "a")) == ["loss", "metric", "model", "step"]


@pytest.mark.parametrize("flag", ["dcp", "dcp_async"])
def test_a_run_that_is_resumed_twice_has_one_link_named_last(tmp_path: Path, flag: str) -> None:
    for steps in (2, 4, 6):
        last = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_last="link")
        fit(flag, devices=1, steps=steps, callbacks=[last], resume="last" if steps > 2 else None)
        assert sorted(os.listdir(tmp_path)) == ["last.ckpt", f"step={steps}.ckpt"]
        assert os.readlink(tmp_path / "last.ckpt") == f"step={steps}.ckpt"


def test_a_trainer_saves_a_module_that_was_connected_and_never_ran(tmp_path: Path) -> None:
    runner = trainer("dcp", devices=1, steps=1)
    runner.strategy.connect(Regression())
    runner.save_checkpoint(tmp_path / "a.ckpt")
    assert is_committed(tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError, match=r"Checkpoint file not found: \S*b\.ckpt.*a\.ckpt"):
        trainer("dcp", devices=1, steps=1).fit(Regression(), Ticks(4), ckpt_path=tmp_path / "b.ckpt")


def test_a_strategy_loads_state_that_was_read_in_another_way(tmp_path: Path) -> None:
    saved = fit("dcp", devices=1, steps=2, save_to=tmp_path / "a.ckpt")
    checkpoint = DCPCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    runner = trainer("dcp", devices=1, steps=1)
    module = Regression()
    runner.strategy.connect(module)
    runner.strategy.load_model_state_dict(checkpoint)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in module.state_dict().items())


class OnlyHead(Regression):
    """Saves and loads its head alone, as a model does whose other weights are pretrained; its head is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = torch.nn.ModuleList([self.net.head])

    def state_dict(self, *args: Any, **options: Any) -> Any:
        state = super().state_dict(*args, **options)
        return {key: value for key, value in state.items() if key.startswith(("net.head", "tied"))}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if strict and sorted(state_dict) != ["net.head.bias", "net.head.weight", "tied.0.bias", "tied.0.weight"]:
            raise KeyError(sorted(state_dict))
        return super().load_state_dict(state_dict, strict=False, assign=assign)


def test_a_module_that_saves_a_part_of_itself_judges_the_keys_itself(tmp_path: Path) -> None:
    found = []
    for flag in ("dcp", "auto"):
        fit(flag, devices=1, steps=1, save_to=tmp_path / flag, module=OnlyHead())
        module = fit(flag, devices=1, steps=2, resume=tmp_path / flag, module=OnlyHead())
        found.append((module.losses, digest(dict(module.named_parameters()))))
    assert found[0] == found[1]
