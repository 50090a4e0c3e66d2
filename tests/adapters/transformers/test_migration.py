"""From the stock Trainer's checkpoints to ours, and back."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_plugins.errors import UnsafeCheckpointError
from dcp_plugins.testing.ranks import run_ranks
from dcp_plugins.transformers import DCPCallback, write_stock_checkpoint
from tests.adapters.transformers.trainers import Digests, StopAt, files, fit, fsdp, outcome, trainer

STOCK = {"model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def test_the_stock_trainer_resumes_exactly_from_what_is_written_for_it(tmp_path: Path) -> None:
    expected = outcome(fit(tmp_path / "whole", save_strategy="no"))
    fit(tmp_path / "ours", StopAt(4), DCPCallback(asynchronous="thread"))
    runner = trainer(tmp_path / "ours")
    numbers = torch.get_rng_state()
    write_stock_checkpoint(runner, tmp_path / "ours" / "checkpoint-4", tmp_path / "stock" / "checkpoint-4")
    assert torch.equal(torch.get_rng_state(), numbers), "the random numbers of this process are its own"
    assert set(files(tmp_path / "stock" / "checkpoint-4")) >= STOCK
    assert outcome(fit(tmp_path / "stock", resume=True)) == expected


def test_of_weights_alone_no_optimizer_is_made_up_and_no_checkpoint_of_ours_is_written_over(tmp_path: Path) -> None:
    fit(tmp_path, StopAt(2), DCPCallback(), save_only_model=True)
    ours, back = tmp_path / "checkpoint-2", tmp_path / "back" / "checkpoint-2"
    write_stock_checkpoint(trainer(tmp_path), ours, back)
    assert {"model.safetensors", "trainer_state.json"} <= set(files(back))
    assert not {"optimizer.pt", "scheduler.pt", "rng_state.pth"} & set(files(back))
    with pytest.raises(ValueError, match="checkpoint-2 is a checkpoint of DCPCallback: name another"):
        write_stock_checkpoint(trainer(tmp_path), ours, ours)
    assert files(ours) == [".metadata", "data", "trainer_state.json"]


def test_with_hf_weights_alone_the_stock_trainer_goes_on_with_the_weights_only(tmp_path: Path) -> None:
    seen = Digests()
    fit(tmp_path, StopAt(4), DCPCallback(hf_weights=True))
    stock = fit(tmp_path, seen, resume=tmp_path / "checkpoint-4")
    assert stock.state.global_step == 8
    ours = Digests()
    fit(tmp_path, ours, DCPCallback(), resume=tmp_path / "checkpoint-4")
    weights = {name for name in ours.begun_with if not name.startswith(("state.", "param_groups."))}
    assert weights
    assert {name: seen.begun_with[name] for name in weights} == {name: ours.begun_with[name] for name in weights}
    assert seen.begun_with != ours.begun_with


def take_over_and_go_back(version: int, folder: Path) -> tuple[list[bool], dict[str, str]]:
    """Take over a stock run under FSDP; and write a checkpoint of ours as one of stock's."""
    options = fsdp(version)
    whole = outcome(fit(folder / "whole", save_strategy="no", **options))
    fit(folder, StopAt(4), **options)
    seen = Digests()
    exact = [outcome(fit(folder, seen, DCPCallback(), resume=True, **options)) == whole]
    # Of what it writes under FSDP1, stock (Accelerate 1.15) restores the weights, but not the optimizer's state.
    if version == 2:
        write_stock_checkpoint(trainer(folder, **options), folder / "checkpoint-6", folder / "back" / "checkpoint-6")
        exact.append(outcome(fit(folder / "back", resume=True, **options)) == whole)
    return exact, seen.begun_with


def load_alone(checkpoint: Path) -> dict[str, str]:
    seen = Digests()
    fit(checkpoint.parent, seen, StopAt(5), DCPCallback(), resume=checkpoint, save_strategy="no")
    return seen.begun_with


@pytest.mark.parametrize("version", [1, 2])
def test_stocks_sharded_checkpoints_are_taken_over_under_fsdp_and_without_it(tmp_path: Path, version: int) -> None:
    exact, loaded = run_ranks(2, take_over_and_go_back, version, tmp_path, timeout_seconds=120)[0]
    assert all(exact)
    assert set(files(tmp_path / "checkpoint-4")) >= {"pytorch_model_fsdp_0", "optimizer_0", "scheduler.pt"}
    # Stock refuses this: "only supported when using PyTorch FSDP".
    assert load_alone(tmp_path / "checkpoint-4") == loaded


class Attack:
    def __reduce__(self) -> Any:
        return (print, ("this must not appear",))


def test_pickles_of_foreign_checkpoints_run_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, StopAt(2))
    torch.save(Attack(), tmp_path / "checkpoint-2" / "scheduler.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        fit(tmp_path, DCPCallback(), resume=True)
    shutil.rmtree(tmp_path / "checkpoint-2")
    fit(tmp_path, StopAt(2), DCPCallback())
    (tmp_path / "checkpoint-2" / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.warns(UserWarning, match="Skipped .*unsafe to load"), pytest.raises(UnsafeCheckpointError):
        fit(tmp_path, DCPCallback(), resume=tmp_path / "checkpoint-2")
    assert "this must not appear" not in capsys.readouterr().out
