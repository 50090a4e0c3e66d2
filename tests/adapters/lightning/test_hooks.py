"""Hooks see what stock shows them, at the same time as with stock, and their edits are restored."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, EMAWeightAveraging
from torch import nn

from dcp_plugins.lightning import DCPCheckpointIO
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.trainers import WIDTH, Regression, Ticks, digest, fit, quiet, trainer, whole_state

KEY = "net.head.weight"


class Hooked(Regression):
    """Calls a function with the checkpoint."""

    def __init__(self, hook: Callable[[Regression, dict[str, Any]], None] | None = None) -> None:
        super().__init__()
        self.hook = hook

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.hook is not None:
            self.hook(self, checkpoint)


def as_seen(strategy: str, path: Path) -> Any:
    """Describe everything that a hook finds in a checkpoint."""
    seen: list[Any] = []

    def look(module: Regression, checkpoint: dict[str, Any]) -> None:
        optimizer = checkpoint["optimizer_states"][0]
        seen.append(
            {
                "keys": list(checkpoint),
                "kinds": [isinstance(one, dict) for one in (checkpoint["state_dict"], optimizer)],
                "weights": digest(checkpoint["state_dict"]),
                "order": list(checkpoint["state_dict"]),
                "state": digest({str(number): value for number, value in optimizer["state"].items()}),
                "groups": optimizer["param_groups"],
                "schedulers": checkpoint["lr_schedulers"],
            }
        )

    fit(strategy, devices=1, steps=2, save_to=path)
    fit(strategy, devices=1, steps=2, resume=path, module=Hooked(look))
    return seen[0]


def test_a_hook_sees_what_stock_shows_it(tmp_path: Path) -> None:
    assert as_seen("dcp", tmp_path / "ours.ckpt") == as_seen("auto", tmp_path / "stock.ckpt")


def rename(module: Any, checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"] = {
        name.replace("net.head", "head"): value for name, value in checkpoint["state_dict"].items()
    }


class Renamed(Hooked):
    """Its head has another name than in the run that was saved."""

    def __init__(self) -> None:
        super().__init__(rename)
        head, self.net.head = self.net.head, nn.Identity()
        self.head = head
        self.net.scale, scale = torch.tensor(1.0), self.net.scale
        self.net.register_forward_hook(lambda net, args, x: self.head(x) * scale)


def scale_one(module: Any, checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"][KEY].mul_(2)


def delete_one(module: Any, checkpoint: dict[str, Any]) -> None:
    module.strict_loading = False
    del checkpoint["state_dict"][KEY]


def build_layer(module: Any, checkpoint: dict[str, Any]) -> None:
    width = checkpoint["state_dict"]["net.blocks.0.linear.weight"].shape[0]
    checkpoint["state_dict"]["net.blocks.0.linear.bias"] = torch.arange(float(width))


def fresh_learning_rate(module: Any, checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = 0.5
    checkpoint["lr_schedulers"] = []


def fresh_moments(module: Any, checkpoint: dict[str, Any]) -> None:
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state["exp_avg"].zero_()


def no_state(module: Any, checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"] = [{**checkpoint["optimizer_states"][0], "state": {}}]


def no_optimizer(module: Any, checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"] = []


def another_group(module: Any, checkpoint: dict[str, Any]) -> None:
    state = checkpoint["optimizer_states"][0]
    group = state["param_groups"][0]
    state["param_groups"] = [{**group, "lr": 0.3, "params": list(group["params"])}]


EDITS = [
    scale_one,
    delete_one,
    build_layer,
    fresh_learning_rate,
    fresh_moments,
    no_state,
    no_optimizer,
    another_group,
]


def edited(strategy: str, devices: int, path: Path, steps: int) -> list[Any]:
    """Resume from a checkpoint with each of the edits, and describe the end of each run."""
    found: list[Any] = []
    for edit in EDITS:
        module = fit(strategy, devices=devices, steps=steps, resume=path, module=Hooked(edit))
        groups = module.trainer.optimizers[0].param_groups
        state = module.trainer.optimizers[0].state
        found.append((module.losses, groups[0]["lr"], len(state), whole_state(module)[f".model.{KEY}"]))
    return found


def save_and_edit(strategy: str, devices: int, path: Path, steps: int) -> list[Any]:
    fit(strategy, devices=devices, steps=2, save_to=path)
    return edited(strategy, devices, path, steps)


def test_the_edits_of_a_hook_are_restored_as_by_stock(tmp_path: Path) -> None:
    ours, stock = (save_and_edit(flag, 1, tmp_path / f"{flag}.ckpt", 4) for flag in ("dcp", "auto"))
    assert ours == stock
    assert ours[EDITS.index(fresh_learning_rate)][1] > 0.01


@pytest.mark.parametrize("strategy", ["dcp_ddp", "dcp_fsdp", "dcp_fsdp2"])
def test_the_edits_of_hooks_on_every_rank_are_restored(tmp_path: Path, strategy: str) -> None:
    whole = save_and_edit("auto", 1, tmp_path / "whole.ckpt", 3)
    for ranks in run_ranks(2, save_and_edit, strategy, 2, tmp_path / "a.ckpt", 3):
        for (losses, lr, _, _), (expected, expected_lr, _, _) in zip(ranks, whole, strict=True):
            assert losses == pytest.approx(expected, rel=1e-4)
            assert lr == expected_lr


def lose_a_weight(module: Any, checkpoint: dict[str, Any]) -> None:
    del checkpoint["state_dict"][KEY]


def test_what_does_not_fit_after_an_edit_is_refused_with_advice_for_users_of_lightning(tmp_path: Path) -> None:
    fit("dcp", devices=1, steps=1, save_to=tmp_path / "a")
    with pytest.raises(RuntimeError, match="strict_loading = False") as refused:
        fit("dcp", devices=1, steps=2, resume=tmp_path / "a", module=Hooked(lose_a_weight))
    assert "StateDictOptions" not in str(refused.value)


def test_a_renamed_model_goes_on_with_its_optimizer(tmp_path: Path) -> None:
    losses = []
    for flag in ("dcp", "auto"):
        fit(flag, devices=1, steps=2, save_to=tmp_path / flag)
        losses.append(fit(flag, devices=1, steps=4, resume=tmp_path / flag, module=Renamed()).losses)
    assert losses[0] == losses[1]
    assert sorted(losses[0]) == [2, 3]


class Doubling(nn.Linear):
    """Loads twice the bias that was saved."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict[f"{prefix}bias"] = state_dict[f"{prefix}bias"] * 2
        super()._load_from_state_dict(state_dict, prefix, *args)


class OwnWay(Regression):
    """Keeps its own head, whatever the checkpoint has, and has a block that doubles its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.net.blocks[0].linear = Doubling(WIDTH, WIDTH)
        with torch.no_grad():
            self.net.head.weight.fill_(3.0)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        kept = {name: value for name, value in state_dict.items() if not name.startswith("net.head")}
        return super().load_state_dict(kept, strict=False)


def test_a_module_that_loads_in_its_own_way_has_the_last_word(tmp_path: Path) -> None:
    found = {}
    for flag in ("dcp", "auto"):
        fit(flag, devices=1, steps=1, save_to=tmp_path / flag)
        module = OwnWay()
        trainer(flag, devices=1, steps=1).validate(module, Ticks(1), ckpt_path=tmp_path / flag, verbose=False)
        found[flag] = digest(module.state_dict())
        assert torch.equal(module.net.head.weight, torch.full((1, WIDTH), 3.0))
    assert found["dcp"] == found["auto"]


class Converting(nn.Linear):
    """Its first version saved half of the bias."""

    _version = 2

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, about: dict[str, Any], *args: Any) -> None:
        if about.get("version", 1) < 2:
            state_dict[f"{prefix}bias"] = state_dict[f"{prefix}bias"] * 2
        super()._load_from_state_dict(state_dict, prefix, about, *args)


class Versioned(Regression):
    """Has a module of the second version where `Regression` has one of the first."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.net.blocks[0].linear = Converting(WIDTH, WIDTH)


class VersionedAndHooked(Versioned):
    """Reads one weight in a hook, so that the others are restored apart from it."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"].get(KEY)


def test_modules_of_another_version_convert_what_was_saved(tmp_path: Path) -> None:
    found: dict[str, list[Any]] = {"dcp": [], "auto": []}
    for flag, states in found.items():
        for saved in (Regression(), Versioned()):
            path = tmp_path / f"{flag}-{type(saved).__name__}"
            fit(flag, devices=1, steps=1, save_to=path, module=saved)
            for kind in (Versioned, VersionedAndHooked):
                module = kind()
                trainer(flag, devices=1, steps=1).validate(module, Ticks(1), ckpt_path=path, verbose=False)
                states.append(digest(module.state_dict()))
            states.append(digest(Versioned.load_from_checkpoint(path).state_dict()))
    assert found["dcp"] == found["auto"]


# -- Order -----------------------------------------------------------------------------------------------------------


class AtFitStart(Regression):
    """Notes its weights when the fit starts."""

    def on_fit_start(self) -> None:
        self.at_fit_start = digest(self.state_dict())


@pytest.mark.parametrize("strategy", ["dcp", "dcp_async"])
def test_weights_and_loops_are_there_when_the_fit_starts(tmp_path: Path, strategy: str) -> None:
    saved = fit(strategy, devices=1, steps=2, save_to=tmp_path / "a.ckpt")
    resumed = AtFitStart()
    fit(strategy, devices=1, steps=3, resume=tmp_path / "a.ckpt", module=resumed)
    assert resumed.at_fit_start == digest(saved.state_dict())


class Unfreezing(Regression):
    """Has what `BackboneFinetuning` needs: a backbone, and an optimizer of the parameters that train."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.net.blocks

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([one for one in self.parameters() if one.requires_grad], lr=0.01)


def finetune(strategy: Any, devices: int, path: Path) -> tuple[Any, Any]:
    quiet()

    def run(epochs: int, resume: Path | None) -> Any:
        runner = pl.Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=strategy,
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
        )
        module = Unfreezing()
        runner.fit(module, Ticks(2), Ticks(1), ckpt_path=resume)
        if resume is None:
            runner.save_checkpoint(path)
        return module

    run(2, None)
    module = run(3, path)
    return module.losses, [len(group["params"]) for group in module.trainer.optimizers[0].param_groups]


def test_a_backbone_that_was_unfrozen_goes_on_training(tmp_path: Path) -> None:
    ours, stock = (finetune(flag, 1, tmp_path / flag) for flag in ("dcp", "auto"))
    assert ours == stock
    assert len(ours[1]) == 2


class Grouped(Regression):
    """Trains the head alone, or the blocks in a group of their own."""

    def __init__(self, *, trains_blocks: bool) -> None:
        super().__init__()
        self.trains_blocks = trains_blocks

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.net.head.parameters(), lr=0.01)
        if self.trains_blocks:
            optimizer.add_param_group({"params": list(self.net.blocks.parameters()), "lr": 0.02})
        return optimizer


def resume_with_fewer_groups(flags: list[str], folder: Path) -> list[str]:
    refusals = []
    for flag in flags:
        fit(flag, devices=1, steps=1, save_to=folder / flag, module=Grouped(trains_blocks=True))
        with pytest.raises(ValueError, match=r"1 group\(s\): .*2 group\(s\): ") as caught:
            fit(flag, devices=1, steps=2, resume=folder / flag, module=Grouped(trains_blocks=False))
        refusals.append(str(caught.value))
    return refusals


def test_fewer_groups_than_the_checkpoint_has_are_refused_by_name(tmp_path: Path) -> None:
    flags = ["dcp", "dcp_ddp", "dcp_fsdp", "dcp_fsdp2"]
    for refusal in run_ranks(1, resume_with_fewer_groups, flags, tmp_path)[0]:
        assert "net.blocks.0.linear.weight" in refusal


def averaged_run(strategy: Any, devices: int, path: Path) -> Any:
    quiet()
    fit(strategy, devices=devices, steps=2, save_to=path, callbacks=[EMAWeightAveraging(decay=0.5)])
    module = fit(strategy, devices=devices, steps=4, resume=path, callbacks=[EMAWeightAveraging(decay=0.5)])
    return module.losses, digest(module.state_dict())


def averaged_runs_on_ranks(folder: Path) -> Any:
    return averaged_run("dcp_ddp", 2, folder / "ours"), averaged_run("ddp", 2, folder / "stock")


def test_averaged_weights_resume(tmp_path: Path) -> None:
    ours, stock = (averaged_run(flag, 1, tmp_path / flag) for flag in ("dcp", "auto"))
    assert ours == stock
    for ours, stock in run_ranks(2, averaged_runs_on_ranks, tmp_path):
        assert ours == stock


# -- Lazy ------------------------------------------------------------------------------------------------------------


def bytes_read() -> int:
    """Return the number of bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split()[1])


class Wide(Hooked):
    """Has layers so large that one read of a layer shows in the number of bytes."""

    def __init__(self, hook: Any = None) -> None:
        super().__init__(hook)
        self.net.wide = nn.Linear(1024, 1024)
        self.net.unused = nn.Linear(1024, 1024)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        # A gradient, so that the optimizer keeps moments.
        return super().training_step(batch, batch_idx) + 0 * self.net.wide.weight.sum()


def test_entries_that_no_hook_touches_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit("dcp", devices=1, steps=1, save_to=path, module=Wide())
    one = 1024 * 1024 * 4
    read: list[int] = []
    for hook in (None, lambda _, checkpoint: checkpoint["state_dict"][KEY]):
        runner = trainer("dcp", devices=1, steps=1)
        before = bytes_read()
        runner.validate(Wide(hook), Ticks(1), ckpt_path=path, verbose=False)
        read.append(bytes_read() - before)
    for count in read:
        assert 2 * one <= count < 2.5 * one, "each weight once, and no optimizer"
    before = bytes_read()
    fit("dcp", devices=1, steps=2, resume=path, module=Wide())
    assert 4 * one <= bytes_read() - before < 4.5 * one, "each weight and each moment once"


def test_a_state_dict_that_a_hook_keeps_outlives_the_checkpoint(tmp_path: Path) -> None:
    kept: list[Any] = []

    class Deletes(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.strategy.remove_checkpoint(tmp_path / "a.ckpt")

    saved = fit("dcp", devices=1, steps=2, save_to=tmp_path / "a.ckpt")
    expected = digest(saved.state_dict())
    module = Hooked(lambda _, checkpoint: kept.append(checkpoint["state_dict"]))
    fit("dcp", devices=1, steps=3, resume=tmp_path / "a.ckpt", module=module, callbacks=[Deletes()])
    assert not (tmp_path / "a.ckpt").exists()
    assert digest(kept[0]) == expected


COPIES: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "starred": lambda state: {**state},
    "ordered": OrderedDict,
    "merged": lambda state: {} | state,
    "merged first": lambda state: state | {},
    "copied": copy.copy,
    "method": lambda state: state.copy(),
    "deep": copy.deepcopy,
    "pickled": lambda state: pickle.loads(pickle.dumps(state)),
    "items": lambda state: dict(state.items()),
    "values": lambda state: dict(zip(state.keys(), state.values(), strict=True)),
    "of its class": lambda state: type(state)(OrderedDict(state.items())).copy(),
    "popped": lambda state: {key: state.pop(key) for key in list(state)},
}


def test_copies_of_a_state_dict_are_ordinary_and_whole(tmp_path: Path) -> None:
    saved = fit("dcp", devices=1, steps=1, save_to=tmp_path / "a.ckpt")
    expected = digest(saved.state_dict())
    for name, make in COPIES.items():
        state = DCPCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["state_dict"]
        assert KEY in state
        assert list(state) == list(saved.state_dict())
        made = make(state)
        assert type(made) in (dict, OrderedDict), name
        assert digest(made) == expected, name
        assert state.get("nothing", 3) == state.setdefault("new", 3) == 3
