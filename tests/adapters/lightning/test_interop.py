"""Stock Lightning reads what we write, and we read what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from dcp_plugins.lightning import DCPCheckpointIO, consolidate, load_from_checkpoint
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.trainers import Regression, Ticks, digest, fit, trainer, whole_state


class Sharded(Regression):
    """As stock ModelParallelStrategy wants it: the author shards."""

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        if not isinstance(self.net, torch.distributed.fsdp.FSDPModule):
            for block in self.net.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def stock_model_parallel() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


class FSDPOnCPU(FSDPStrategy):
    """Lightning refuses the exact class on the CPU; torch needs the device spelled out there."""

    def __init__(self) -> None:
        super().__init__(state_dict_type="sharded")

    def _setup_model(self, model: torch.nn.Module) -> FullyShardedDataParallel:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def ours_then_stock_model_parallel(path: Path) -> tuple[Any, ...]:
    saved = fit("dcp_fsdp2", devices=2, steps=3, save_to=path)
    saved_state = whole_state(saved)
    loaded = fit(stock_model_parallel(), devices=2, steps=3, resume=path, module=Sharded())
    on = fit(stock_model_parallel(), devices=2, steps=5, resume=path, module=Sharded())
    ours = fit("dcp_fsdp2", devices=2, steps=5, resume=path)
    return saved_state, whole_state(loaded), on.losses, ours.losses


def stock_model_parallel_then_ours(path: Path) -> tuple[Any, ...]:
    saved = fit(stock_model_parallel(), devices=2, steps=3, save_to=path, module=Sharded())
    saved_state = whole_state(saved)
    loaded = fit("dcp_fsdp2", devices=2, steps=3, resume=path)
    on = fit("dcp_fsdp2", devices=2, steps=5, resume=path)
    stock = fit(stock_model_parallel(), devices=2, steps=5, resume=path, module=Sharded())
    return saved_state, whole_state(loaded), stock.losses, on.losses


@pytest.mark.parametrize("exchange", [ours_then_stock_model_parallel, stock_model_parallel_then_ours])
def test_model_parallel_strategy_and_ours_resume_each_others_runs(tmp_path: Path, exchange: Any) -> None:
    for saved, loaded, stock_losses, our_losses in run_ranks(2, exchange, tmp_path / "a.ckpt"):
        assert loaded == saved
        assert stock_losses == our_losses
        assert sorted(our_losses) == [3, 4]
    module = load_from_checkpoint(Regression, tmp_path / "a.ckpt")
    consolidate(tmp_path / "a.ckpt", tmp_path / "one.ckpt")
    same = Regression.load_from_checkpoint(tmp_path / "one.ckpt")
    assert module.hparams == same.hparams == {"lr": 0.01}
    assert digest(module.state_dict()) == digest(same.state_dict())


def ours_then_stock_fsdp(flag: str, path: Path) -> tuple[Any, ...]:
    # The flag for FSDP1 names the model as stock does by itself.
    plugin = DCPCheckpointIO() if flag == "dcp_fsdp" else DCPCheckpointIO(model_key="model")
    ours = fit(flag, devices=2, steps=3, save_to=path, plugins=[plugin])
    expected = validated(ours, flag, None)
    stock = fit(FSDPOnCPU(), devices=2, steps=5, resume=path)
    on = fit(flag, devices=2, steps=5, resume=path)
    return expected, validated(Regression(), FSDPOnCPU(), path), stock.losses, on.losses


def stock_fsdp_then_ours(flag: str, path: Path) -> tuple[Any, ...]:
    fit(FSDPOnCPU(), devices=2, steps=3, save_to=path)
    expected = validated(Regression(), FSDPOnCPU(), path)
    stock = fit(FSDPOnCPU(), devices=2, steps=5, resume=path)
    on = fit(flag, devices=2, steps=5, resume=path)
    return expected, validated(Regression(), flag, path), stock.losses, on.losses


def validated(module: Regression, strategy: Any, path: Path | None) -> float:
    runner = trainer(strategy, devices=2, steps=3)
    runner.validate(module, Ticks(1), ckpt_path=path, verbose=False)
    return module.seen[-1]


@pytest.mark.parametrize(
    ("exchange", "flag"),
    [
        (ours_then_stock_fsdp, "dcp_fsdp"),
        (ours_then_stock_fsdp, "dcp_ddp"),
        (stock_fsdp_then_ours, "dcp_fsdp"),
        (stock_fsdp_then_ours, "dcp_fsdp2"),
    ],
)
def test_fsdp_strategy_and_ours_resume_each_others_runs(tmp_path: Path, exchange: Any, flag: str) -> None:
    for expected, seen, stock_losses, our_losses in run_ranks(2, exchange, flag, tmp_path / "a.ckpt"):
        assert seen == pytest.approx(expected, rel=1e-6)
        assert stock_losses == pytest.approx(our_losses, rel=1e-5)
        assert sorted(our_losses) == [3, 4]


def stock_ddp_file_then_ours(path: Path) -> tuple[Any, ...]:
    saved = whole_state_of_stock(fit(DDPStrategy(), devices=2, steps=3, save_to=path))
    stock = fit(DDPStrategy(), devices=2, steps=5, resume=path)
    results = []
    for strategy in ("dcp_ddp", "dcp_fsdp", "dcp_fsdp2"):
        loaded = fit(strategy, devices=2, steps=3, resume=path)
        on = fit(strategy, devices=2, steps=5, resume=path)
        results.append((digest({"model": loaded.trainer.strategy.lightning_module_state_dict()}), on.losses))
    return saved, stock.losses, results


def whole_state_of_stock(module: Regression) -> dict[str, str]:
    return digest({"model": module.trainer.strategy.lightning_module_state_dict()})


def test_an_ordinary_checkpoint_file_of_stock_ddp_resumes_under_ours(tmp_path: Path) -> None:
    for saved, stock_losses, results in run_ranks(2, stock_ddp_file_then_ours, tmp_path / "a.ckpt"):
        for loaded, losses in results:
            assert loaded == saved
            assert losses == pytest.approx(stock_losses, rel=1e-5)


def save(flag: str, path: Path) -> dict[str, str]:
    return whole_state(fit(flag, devices=2, steps=3, save_to=path))


@pytest.mark.parametrize(("flag", "model_key"), [("dcp_fsdp", "model"), ("dcp_fsdp2", "state_dict")])
def test_lightnings_consolidation_reads_ours_whole(tmp_path: Path, flag: str, model_key: str) -> None:
    saved = run_ranks(2, save, flag, tmp_path / "a.ckpt")[0]
    consolidated = _load_distributed_checkpoint(tmp_path / "a.ckpt")
    assert consolidated["global_step"] == 3
    assert digest({"model": consolidated[model_key], "optimizer_0": consolidated["optimizer_0"]["state"]}) == saved


@pytest.mark.parametrize("flag", ["dcp_fsdp", "dcp_fsdp2"])
def test_without_a_module_a_directory_loads_as_an_ordinary_lightning_checkpoint(tmp_path: Path, flag: str) -> None:
    saved = run_ranks(2, save, flag, tmp_path / "a.ckpt")[0]
    checkpoint = DCPCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert {"epoch", "global_step", "loops", "callbacks", "lr_schedulers", "hyper_parameters"} <= checkpoint.keys()
    assert "lightning_meta" not in checkpoint
    optimizer = checkpoint["optimizer_states"][0]
    # Numbers, in the order of the parameters, as stock has it.
    names = [name for name, _ in Regression().named_parameters()]
    assert optimizer["param_groups"][0]["params"] == list(range(len(names)))
    states = {names[number]: state for number, state in optimizer["state"].items()}
    assert digest({"model": checkpoint["state_dict"], "optimizer_0": states}) == saved
    on_meta = DCPCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", map_location="meta")
    assert on_meta["state_dict"]["net.head.weight"].is_meta
