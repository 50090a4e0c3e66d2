"""Runs whose code has changed since the save, and callbacks that see a restore, go on as with stock, bit for bit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder, StochasticWeightAveraging, Timer

from dcp_plugins.errors import UnsupportedValueError
from tests.adapters.lightning.trainers import Regression, Ticks, digest, fit, quiet, trainer


class Configured(Regression):
    """Makes its optimizer, and perhaps a scheduler, by a function."""

    make: Callable[[Any], Any]

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def configured(make: Callable[[Any], Any]) -> Configured:
    module = Configured()
    module.make = make
    return module


def adam(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, 0.01)


def amsgrad(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, 0.02, amsgrad=True)


def plain_sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, 0.01)


def momentum(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, 0.02, momentum=0.9, nesterov=True)


def scheduled(parameters: Any) -> Any:
    optimizer = adam(parameters)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]


CHANGES = [(adam, scheduled), (scheduled, adam), (adam, amsgrad), (plain_sgd, momentum), (momentum, plain_sgd)]


def go_on(flag: str, folder: Path) -> list[Any]:
    """Save with one optimizer, and go on with another one."""
    found: list[Any] = []
    for number, (before, after) in enumerate(CHANGES):
        path = folder / f"{number}.ckpt"
        fit(flag, devices=1, steps=2, save_to=path, module=configured(before))
        module = fit(flag, devices=1, steps=5, resume=path, module=configured(after))
        groups = module.trainer.optimizers[0].param_groups
        # Stock drops `initial_lr`, which a scheduler that was added has set; nothing reads it any more.
        options = [{name: group[name] for name in group.keys() - {"params", "initial_lr"}} for group in groups]
        found.append((module.losses, digest(module.state_dict()), options))
    return found


def test_a_run_whose_optimizer_has_changed_goes_on_as_with_stock(tmp_path: Path) -> None:
    (tmp_path / "auto").mkdir()
    ours, stock = (go_on(flag, tmp_path / flag) for flag in ("dcp", "auto"))
    for (before, after), found, expected in zip(CHANGES, ours, stock, strict=True):
        assert found == expected, (before.__name__, after.__name__)


class Found(Regression):
    """Has its learning rate in the attribute that the finder changes."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.01

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.lr)


@pytest.mark.parametrize("flag", ["dcp", "dcp_async"])
def test_the_learning_rate_finder_puts_back_what_it_has_found(tmp_path: Path, flag: str) -> None:
    found = []
    for strategy in (flag, "auto"):
        quiet()
        finder = LearningRateFinder(num_training_steps=20)
        module = fit(strategy, devices=1, steps=3, module=Found(), callbacks=[finder], default_root_dir=tmp_path)
        found.append((module.losses[2], module.lr, finder.optimal_lr.results, digest(module.state_dict())))
    assert found[0] == found[1]
    assert list(tmp_path.iterdir()) == []


class Elapsed(Callback):
    """Looks at the timer when the fit starts."""

    def __init__(self, timer: Timer) -> None:
        self.timer = timer

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.at_start = self.timer.time_elapsed("train")


def test_a_timer_has_its_time_back_before_the_fit_starts(tmp_path: Path) -> None:
    fit("dcp", devices=1, steps=2, save_to=tmp_path / "a.ckpt", callbacks=[timer := Timer("00:01:00:00")])
    saved = timer.time_elapsed("train")
    again = Elapsed(resumed := Timer("00:01:00:00"))
    fit("dcp", devices=1, steps=3, resume=tmp_path / "a.ckpt", callbacks=[resumed, again])
    assert again.at_start >= saved > 0


def averaged(flag: str, path: Path) -> Any:
    def run(epochs: int, resume: Path | None) -> Any:
        quiet()
        runner = pl.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=flag,
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[StochasticWeightAveraging(0.02, swa_epoch_start=1, annealing_epochs=2)],
        )
        module = configured(decaying)
        runner.fit(module, Ticks(2), Ticks(1), ckpt_path=resume)
        return module

    run(3, None).trainer.save_checkpoint(path)
    module = run(5, path)
    return module.losses, digest(module.state_dict())


def decaying(parameters: Any) -> Any:
    optimizer = plain_sgd(parameters)
    return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)]


def test_stochastic_weight_averaging_resumes_as_with_stock(tmp_path: Path) -> None:
    assert averaged("dcp", tmp_path / "ours") == averaged("auto", tmp_path / "stock")


class Choice:
    """A class whose objects are not plain data."""


class WithChoice(Regression):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["choice"] = Choice()


@pytest.mark.filterwarnings("ignore:these values are saved")
def test_a_value_that_is_not_plain_data_is_named_and_loads_with_weights_only_off(tmp_path: Path) -> None:
    for flag, error in (("dcp", UnsupportedValueError), ("auto", pickle.UnpicklingError)):
        path = tmp_path / flag
        fit(flag, devices=1, steps=1, save_to=path, module=WithChoice())
        runner = trainer("dcp", devices=1, steps=2)
        with pytest.raises(error, match=rf"{path} .*test_as_stock.Choice") as caught:
            runner.fit(Regression(), Ticks(10), ckpt_path=path)
        assert "\x1b" not in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        module = Regression()
        trainer("dcp", devices=1, steps=2).fit(module, Ticks(10), ckpt_path=path, weights_only=False)
        assert sorted(module.losses) == [1]
