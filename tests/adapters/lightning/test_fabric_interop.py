"""Stock Fabric loads what Fabric saves under our flags where its layout permits, and we load what it saved."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointException
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.fabrics import Run, fabric_of, shard_by_hand, wrap_by_hand
from tests.adapters.lightning.trainers import Net, fit


class FSDPOnCPU(FSDPStrategy):
    """Lightning refuses the exact class on the CPU; torch needs the device spelled out there."""

    def __init__(self, state_dict_type: Any = "sharded") -> None:
        super().__init__(state_dict_type=state_dict_type)

    def setup_module(self, module: torch.nn.Module) -> torch.nn.Module:
        return super().setup_module(wrap_by_hand(module))


def stock_of(flag: str) -> Any:
    return FSDPOnCPU if flag == "dcp_fsdp" else model_parallel


def model_parallel() -> ModelParallelStrategy:
    return ModelParallelStrategy(shard_by_hand, data_parallel_size=2, tensor_parallel_size=1)


def run_of(make: Any, *, seed: int = 0) -> Run:
    strategy = make if isinstance(make, str) else make()
    return Run(strategy, together=not isinstance(strategy, ModelParallelStrategy), seed=seed)


def exchange(saving: Any, loading: Any, path: Path) -> tuple[Any, ...]:
    saved = run_of(saving).train(3).save(path)
    loaded = run_of(loading, seed=1)
    model_only = {"model": run_of(loading, seed=2).model}
    remainder = loaded.fabric.load(path, model_only)
    loaded.load(path)
    same = loaded.digest() == saved.digest()
    return same, sorted(remainder), saved.train(5).state["losses"], loaded.train(5).state["losses"]


def exchange_both_ways(flag: str, folder: Path) -> list[Any]:
    return [
        exchange(stock_of(flag), flag, folder / "stock"),
        exchange(flag, stock_of(flag), folder / "ours"),
    ]


@pytest.mark.parametrize("flag", ["dcp_fsdp", "dcp_fsdp2"])
def test_sharded_directories_load_in_the_stock_counterpart_and_back(tmp_path: Path, flag: str) -> None:
    for outcomes in run_ranks(2, exchange_both_ways, flag, tmp_path):
        for same, remainder, expected, found in outcomes:
            assert same
            assert remainder == ["losses", "step"]
            assert found == pytest.approx(expected, rel=1e-6)
            assert sorted(found) == [0, 1, 2, 3, 4]


def replicated_into_stock(folder: Path) -> list[Any]:
    return [exchange("dcp_ddp", stock, folder / stock.__name__) for stock in (FSDPOnCPU, model_parallel)]


def test_directories_of_a_replicated_model_load_in_stocks_sharding_strategies(tmp_path: Path) -> None:
    for outcomes in run_ranks(2, replicated_into_stock, tmp_path):
        for same, _, expected, found in outcomes:
            assert same
            assert found == pytest.approx(expected, rel=1e-5)


def load_what_ddp_has_saved(flag: str, folder: Path) -> Any:
    return exchange(DDPStrategy, flag, folder / f"{flag}.pt")


@pytest.mark.parametrize("flag", ["dcp_ddp", "dcp_fsdp", "dcp_fsdp2"])
def test_a_file_of_stock_ddp_loads(tmp_path: Path, flag: str) -> None:
    for same, remainder, expected, found in run_ranks(2, load_what_ddp_has_saved, flag, tmp_path):
        assert same
        assert remainder == ["losses", "optimizer", "step"]
        assert found == pytest.approx(expected, rel=1e-6)


def save(flag: str, path: Path) -> Any:
    return Run(flag).train(3).save(path).train(5).state["losses"]


def resume_under_stock(path: Path) -> list[Any]:
    losses = []
    for stock in (DDPStrategy, FSDPOnCPU, model_parallel):
        run = run_of(stock, seed=1)
        run.load(path)
        losses.append(run.train(5).state["losses"])
    return losses


@pytest.mark.parametrize("flag", ["dcp_ddp", "dcp_fsdp", "dcp_fsdp2"])
def test_lightnings_own_consolidation_makes_a_file_that_stock_strategies_resume(
    tmp_path: Path, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_ranks(2, save, flag, tmp_path / "a")[0]
    tool = "lightning.fabric.utilities.consolidate_checkpoint"
    monkeypatch.setattr("sys.argv", [tool, str(tmp_path / "a"), "--output_file", str(tmp_path / "a.pt")])
    runpy.run_module(tool, run_name="__main__")
    for losses in run_ranks(2, resume_under_stock, tmp_path / "a.pt"):
        for found in losses:
            assert found == pytest.approx(expected, rel=1e-5)


def from_the_trainer(folder: Path) -> tuple[Any, ...]:
    module = fit("dcp_fsdp2", devices=2, steps=3, save_to=folder / "a.ckpt")
    expected = {f"net.{name}": value for name, value in module.net.state_dict().items()}
    fabric = fabric_of("dcp_fsdp2")
    holder = torch.nn.Module()
    holder.net = Net()
    setup = fabric.setup_module(holder)
    remainder = fabric.load(folder / "a.ckpt", {"state_dict": setup})
    found = setup._forward_module.state_dict()
    equal = all(
        torch.equal(found[name].full_tensor(), expected[name].full_tensor()) for name in found if "scale" not in name
    )
    return equal, remainder["global_step"]


def test_fabric_loads_the_trainers_checkpoints_by_the_names_in_them(tmp_path: Path) -> None:
    assert run_ranks(2, from_the_trainer, tmp_path) == [(True, 3)] * 2


def fail_to_replace(flag: str, stock: Any, path: Path) -> bool:
    """Go on from what stock has saved, into the same path, at first with saves that fail."""
    saved = run_of(stock).train(2).save(path)
    saved.fabric.barrier()
    failing = run_of(flag, seed=1)
    failing.load(path)
    failing.train(3)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp.FileSystemWriter, "finish", fail)
        for _ in range(2):
            with pytest.raises(CheckpointException, match="No space left"):
                failing.save(path)
    loaded = run_of(flag, seed=2)
    loaded.load(path)
    is_as_saved = loaded.state["step"] == 2 and loaded.digest() == saved.digest()
    failing.save(path)
    loaded.load(path)
    return is_as_saved and loaded.state["step"] == 3


@pytest.mark.parametrize(("flag", "stock"), [("dcp_fsdp2", model_parallel), ("dcp_ddp", DDPStrategy)])
def test_what_stock_has_saved_counts_until_a_save_in_its_place_is_committed(
    tmp_path: Path, flag: str, stock: Any
) -> None:
    path = tmp_path / "checkpoint"
    assert run_ranks(2, fail_to_replace, flag, stock, path) == [True, True]
    assert os.listdir(tmp_path) == ["checkpoint"]
    assert sorted(entry.name for entry in path.iterdir() if entry.suffix != ".distcp") == [".metadata", "meta.pt"]
