"""Fabric on the flags: saving, loading, and what is in the directories."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import STRATEGY_REGISTRY
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointException, CheckpointNotFoundError, PlanError
from dcp_plugins.lightning import fabric as ours
from dcp_plugins.lightning import is_committed
from dcp_plugins.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.fabrics import Run, fabric_of, shard_by_hand, whole
from tests.adapters.lightning.trainers import WIDTH, Net, digest

FLAGS = pytest.mark.parametrize(
    ("flag", "ranks"), [("dcp", 1), ("dcp_ddp", 2), ("dcp_fsdp", 2), ("dcp_fsdp2", 2)], ids=lambda value: str(value)
)


@pytest.mark.parametrize(
    ("flag", "strategy"),
    [
        ("dcp", ours.DCPSingleDeviceStrategy),
        ("dcp_ddp", ours.DCPDDPStrategy),
        ("dcp_fsdp", ours.DCPFSDPStrategy),
        ("dcp_fsdp2", ours.DCPFSDP2Strategy),
    ],
)
def test_flags_name_the_strategies_for_fabric(flag: str, strategy: type) -> None:
    assert type(STRATEGY_REGISTRY.get(flag)) is strategy
    assert isinstance(Fabric(accelerator="cpu", strategy=flag, devices=1).strategy, strategy)
    assert STRATEGY_REGISTRY.get(f"{flag}_async").asynchronous is True


def resume(flag: str, folder: Path) -> tuple[Any, ...]:
    through = Run(flag).train(5)
    saved = Run(flag).train(3).save(folder / "a")
    again = Run(flag, seed=1, together=False)
    remainder = again.load(folder / "a")
    same = again.digest() == saved.digest()
    again.train(5)
    return through.state["losses"], again.state["losses"], same, through.digest() == again.digest(), remainder


@FLAGS
@pytest.mark.parametrize("suffix", ["", "_async"])
def test_a_loop_over_fabric_goes_on_as_if_it_had_not_been_interrupted(
    tmp_path: Path, flag: str, ranks: int, suffix: str
) -> None:
    for expected, found, same, ends_the_same, remainder in run_ranks(ranks, resume, flag + suffix, tmp_path):
        assert found == expected
        assert sorted(found) == [0, 1, 2, 3, 4]
        assert same
        assert ends_the_same
        assert remainder == {}
    assert is_committed(tmp_path / "a")


def change_ranks(flag: str, folder: Path) -> tuple[Any, ...]:
    run = Run(flag, seed=1)
    run.load(folder / "a")
    return run.digest(), run.train(5).state["losses"]


@pytest.mark.parametrize("flag", ["dcp_fsdp", "dcp_fsdp2"])
def test_a_checkpoint_loads_on_another_number_of_ranks_and_under_another_flag(tmp_path: Path, flag: str) -> None:
    expected = run_ranks(2, save_and_go_on, flag, tmp_path)[0]
    for other, ranks in (("dcp", 1), ("dcp_ddp", 4), ("dcp_fsdp2", 4)):
        for loaded, losses in run_ranks(ranks, change_ranks, other, tmp_path):
            assert loaded == expected[0]
            assert losses == pytest.approx(expected[1], rel=1e-5)


def save_and_go_on(flag: str, folder: Path) -> tuple[Any, ...]:
    run = Run(flag).train(3).save(folder / "a")
    return run.digest(), run.train(5).state["losses"]


# -- What is asked for, and what is not ------------------------------------------------------------------------------


def ask_for_parts(flag: str, folder: Path) -> dict[str, Any]:
    path = folder / "a"
    saved = Run(flag).train(2).save(path)
    seen: dict[str, Any] = {}
    model_only: dict[str, Any] = {"model": Run(flag, seed=1).model}
    remainder = saved.fabric.load(path, model_only)
    seen["remainder"] = sorted(remainder), remainder["step"]
    everything = saved.fabric.load(path)
    seen["everything"] = sorted(everything), everything["model"]["head.weight"].shape
    seen["same"] = digest({"model": everything["model"], "optimizer": everything["optimizer"]["state"]})
    seen["same"] = seen["same"] == saved.digest()
    wrong: dict[str, Any] = {"model": saved.model, "epoch": 7, "scaler": None}
    with pytest.raises(KeyError, match=r"do not exist in the loaded checkpoint .*: epoch, scaler. It has: .*model"):
        saved.fabric.load(path, wrong)
    saved.fabric.load(path, wrong, strict=False)
    seen["left alone"] = wrong["epoch"]
    as_values: dict[str, Any] = {"model": None, "step": None}
    saved.fabric.load(path, as_values)
    seen["as values"] = sorted(as_values["model"]), as_values["step"]
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        saved.fabric.load(folder / "b")
    with pytest.raises(ValueError, match="lightning_meta' of the state has a name that checkpoints use"):
        saved.fabric.save(folder / "b", {"model": saved.model, "lightning_meta": 1})
    return seen


@FLAGS
def test_a_load_fills_what_the_state_asks_for_and_returns_the_rest_as_stock_does(
    tmp_path: Path, flag: str, ranks: int
) -> None:
    for seen in run_ranks(ranks, ask_for_parts, flag, tmp_path):
        rest = ["losses", "step"] if "fsdp" in flag else ["losses", "optimizer", "step"]
        assert seen["remainder"] == (rest, 2)
        assert seen["everything"] == (["losses", "model", "optimizer", "step"], torch.Size([1, WIDTH]))
        assert seen["same"]
        assert seen["left alone"] == 7
        assert "blocks.0.norm.weight" in seen["as values"][0]
        assert seen["as values"][1] == 2


def filtered(flag: str, path: Path) -> tuple[Any, ...]:
    saved = Run(flag).train(2)
    saved.save(path, filter={"model": lambda name, _: "head" in name, "losses": lambda step, _: step == 1})
    with pytest.raises(PlanError, match=r"Missing key\(s\): blocks.*Pass strict=False to fabric.load"):
        Run(flag, seed=1).load(path)
    again = Run(flag, seed=1)
    before, after = again.digest(), {}
    again.load(path, strict=False)
    after = again.digest()
    heads = all(after[name] == value for name, value in saved.digest().items() if "model.head" in name)
    blocks = all(after[name] == value for name, value in before.items() if "model.blocks" in name)
    return (
        heads,
        blocks,
        again.state["losses"] == {1: saved.state["losses"][1]},
        sorted(saved.fabric.load(path)["model"]),
    )


@pytest.mark.parametrize("flag", ["dcp_ddp", "dcp_fsdp2"])
def test_a_filter_chooses_what_is_saved(tmp_path: Path, flag: str) -> None:
    for heads, blocks, losses, names in run_ranks(2, filtered, flag, tmp_path / "a"):
        assert heads
        assert blocks
        assert losses
        assert names == ["head.bias", "head.weight"]


def load_raw(flag: str, folder: Path) -> list[bool]:
    source = Run(flag).train(2)
    module, optimizer = source.model._forward_module, source.optimizer.optimizer
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(module, options=full), get_optimizer_state_dict(module, optimizer, options=full)
    dcp.save(get_model_state_dict(module), checkpoint_id=folder / "model")
    dcp.save(get_optimizer_state_dict(module, optimizer), checkpoint_id=folder / "optimizer")
    if source.fabric.is_global_zero:
        torch.save(whole[0], folder / "model.pt")
        torch.save(whole[1], folder / "optimizer.pt")
    source.fabric.barrier()
    outcomes = []
    for suffix in ("", ".pt"):
        target = Run(flag, seed=1)
        target.fabric.load_raw(folder / f"model{suffix}", target.model)
        target.fabric.load_raw(folder / f"optimizer{suffix}", target.optimizer)
        outcomes.append(target.digest() == source.digest())
    return outcomes


@FLAGS
def test_load_raw_takes_bare_state_dicts_from_files_and_dcp_directories(tmp_path: Path, flag: str, ranks: int) -> None:
    assert run_ranks(ranks, load_raw, flag, tmp_path) == [[True, True]] * ranks


# -- Several models, several optimizers, objects of the user's -------------------------------------------------------


class Position:
    """An object that gives and takes its state by itself."""

    def __init__(self, at: int) -> None:
        self.at = at

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def several(flag: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """Two models with an optimizer each, one optimizer over both, and one over a tensor of no module."""
    fabric = fabric_of(flag)
    torch.manual_seed(seed)
    first, second = (fabric.setup_module(Net()) for _ in range(2))
    free = torch.randn(3, requires_grad=True)
    apart = [torch.optim.AdamW(module.parameters(), lr=0.01) for module in (first, second)]
    both = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.01, momentum=0.9)
    loose = torch.optim.Adam([free], lr=0.1)
    optimizers = fabric.setup_optimizers(*apart, both, loose)
    for _ in range(2):
        x = torch.ones(4, WIDTH)
        fabric.backward((first(x) + second(x)).square().mean() + free.square().sum())
        for optimizer in optimizers:
            optimizer.step()
    names = ("one", "two", "both", "loose")
    state = {"first.model": first, "second": second, **dict(zip(names, optimizers, strict=True)), "at": Position(seed)}
    return fabric, state


def digests_of(state: dict[str, Any]) -> dict[str, Any]:
    first, second = state["first.model"]._forward_module, state["second"]._forward_module
    return digest(
        {
            "first": get_model_state_dict(first),
            "second": get_model_state_dict(second),
            "one": get_optimizer_state_dict(first, state["one"].optimizer)["state"],
            "two": get_optimizer_state_dict(second, state["two"].optimizer)["state"],
            "momenta": {
                str(index): value["momentum_buffer"]
                for index, value in enumerate(state["both"].optimizer.state.values())
                if value["momentum_buffer"] is not None and value["momentum_buffer"].numel()
            }
            if not flat_shards(first)
            else {},
            "loose": state["loose"].optimizer.state_dict()["state"],
        }
    )


def flat_shards(module: Any) -> bool:
    return isinstance(module, FullyShardedDataParallel)


def save_and_load_several(flag: str, path: Path) -> tuple[Any, ...]:
    fabric, state = several(flag, 0)
    fabric.save(path, state)
    _, other = several(flag, 1)
    differs = digests_of(other) != digests_of(state)
    remainder = fabric.load(path, other)
    return differs, digests_of(other) == digests_of(state), other["at"].at, remainder


@FLAGS
def test_models_and_optimizers_are_matched_by_the_parameters(tmp_path: Path, flag: str, ranks: int) -> None:
    for outcome in run_ranks(ranks, save_and_load_several, flag, tmp_path / "a"):
        assert outcome == (True, True, 0, {})


class Failing:
    def state_dict(self) -> dict[str, Any]:
        if int(os.environ["RANK"]) == 1:
            raise OSError("the loader's worker is gone")
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def fail_in_a_state_dict(path: Path) -> str:
    run = Run("dcp_ddp_async").train(1).save(path)
    run.state["loader"] = Failing()
    try:
        run.save(path)
    except CheckpointException as exc:
        return str(exc)
    return ""


def test_an_object_that_fails_on_one_rank_makes_every_rank_raise_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    for message in run_ranks(2, fail_in_a_state_dict, tmp_path / "a"):
        assert "rank(s) failed: 1" in message
        assert "the loader's worker is gone" in message
    assert is_committed(tmp_path / "a")


# -- Setting up ------------------------------------------------------------------------------------------------------


def set_up(flag: str) -> tuple[Any, ...]:
    together, apart = Run(flag).train(3), Run(flag, together=False).train(3)
    units = [name for name, child in together.model._forward_module.named_modules() if isinstance(child, FSDPModule)]
    run = Run(flag, precision="bf16-mixed").train(1)
    run.fabric.clip_gradients(run.model, run.optimizer, max_norm=0.1)
    gradients = [whole(one.grad) for one in run.model.parameters() if one.grad is not None]
    squared = torch.stack([one.square().sum() for one in gradients]).sum() if gradients else torch.zeros(())
    if flag == "dcp_fsdp":  # each rank has its shard of the gradients
        torch.distributed.all_reduce(squared)
    return together.state["losses"] == apart.state["losses"], units, squared.sqrt().item()


@FLAGS
def test_a_module_is_set_up_with_its_optimizer_or_without(flag: str, ranks: int) -> None:
    for same, units, norm in run_ranks(ranks, set_up, flag):
        assert same
        assert units == (["", "blocks.0", "blocks.1"] if flag == "dcp_fsdp2" else [])
        assert norm == pytest.approx(0.1, rel=0.01)


def set_up_too_late() -> list[str]:
    messages = []
    fabric = fabric_of("dcp_fsdp2")
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(2, WIDTH)).sum().backward()
    optimizer.step()
    for act in (
        lambda: fabric.setup(net, optimizer),
        lambda: fabric_of("dcp_fsdp").setup(shard_by_hand(Net(), fabric.strategy.device_mesh)),
    ):
        try:
            act()
        except (ValueError, TypeError) as exc:
            messages.append(str(exc))
    return messages


def test_what_cannot_be_set_up_is_refused_with_what_to_do_instead() -> None:
    for stepped, sharded in run_ranks(2, set_up_too_late):
        assert "AdamW has stepped before" in stepped
        assert "fabric.setup_optimizers" in stepped
        assert "found modules sharded with fully_shard (FSDP2): (root)" in sharded
    with pytest.raises(ValueError, match="trains on one device, got 2"):
        Fabric(accelerator="cpu", strategy="dcp", devices=2)
