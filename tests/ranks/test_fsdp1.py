"""State dicts of FSDP1 models: pieces of flat parameters, on real ranks, beside the plain model and stock torch."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock_dcp
import torch.distributed.checkpoint.state_dict as stock
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
    fully_shard,
)
from torch.utils._debug_mode import DebugMode

import dcp_plugins as dcp
from dcp_plugins.errors import PlanError, UnsupportedValueError
from dcp_plugins.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from dcp_plugins.testing.ranks import run_ranks
from tests.unit.state_dict.samples import assert_equal

FULL = StateDictOptions(full_state_dict=True)


class Block(nn.Module):
    """Sizes that no number of ranks divides, a convolution, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 5, bias=False)
        self.conv = nn.Conv2d(3, 4, 2)
        self.register_buffer("offset", torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image = x[:1, :4].reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
        return self.second(self.first(x).relu()) + self.offset + self.conv(image).mean()


class Net(nn.Module):
    """Two blocks, and two names of one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(5, 5, bias=False)
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.head.weight
        self.scale = nn.Parameter(torch.ones(3))
        self.double()  # Sums in another order differ less than a step of Adam does.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.tied(self.head(x)) * self.scale.sum()


def wrapped(kind: str) -> nn.Module:
    """Wrap the model as ``kind`` says: flags joined by "+"."""
    flags = kind.split("+")
    model: nn.Module = Net()
    if "channels_last" in flags:
        # Torch's optimizer state dicts of FSDP1 refuse it, and without sharding its gradients are wrong.
        model = model.to(memory_format=torch.channels_last)
    if "ac" in flags:
        for at, block in enumerate(model.blocks):
            model.blocks[at] = checkpoint_wrapper(block)
    strategy = ShardingStrategy.FULL_SHARD
    for flag, found in (
        ("hybrid", ShardingStrategy.HYBRID_SHARD),
        ("grad_op", ShardingStrategy.SHARD_GRAD_OP),
        ("none", ShardingStrategy.NO_SHARD),
    ):
        strategy = found if flag in flags else strategy
    options: dict[str, Any] = {
        "device_id": torch.device("cpu"),
        "use_orig_params": "orig" in flags,
        "sharding_strategy": strategy,
    }
    if "mixed" in flags:
        options["mixed_precision"] = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    if "hybrid" in flags:
        options["device_mesh"] = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    if "mesh" in flags:
        options["device_mesh"] = init_device_mesh("cpu", (dist.get_world_size(),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for at in range(2):
            model.blocks[at] = FullyShardedDataParallel(model.blocks[at], **options)
        model = FullyShardedDataParallel(model, **options)
        if "compiled" in flags:
            return torch.compile(model, backend="eager")
        return model


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, first: int = 0) -> list[float]:
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(first, first + steps):
            optimizer.zero_grad()
            loss = model(batch(step)).double().square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def plain() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def built(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = wrapped(kind)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def close(first: Any, second: Any, where: str = "") -> None:
    """Compare trees whose tensors may differ by rounding."""
    are_dicts = isinstance(first, dict) and isinstance(second, dict)
    is_alike = are_dicts or type(first) is type(second) or isinstance(first, torch.Tensor)
    assert is_alike, (where, type(first), type(second))
    if isinstance(first, dict):
        assert sorted(map(str, first)) == sorted(map(str, second)), where
        for key in first:
            close(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), where
        for at, (one, other) in enumerate(zip(first, second, strict=True)):
            close(one, other, f"{where}.{at}")
    elif isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, msg=lambda text: f"{where}: {text}")
    else:
        assert first == second, where


def by_name(optim: dict[str, Any]) -> dict[str, Any]:
    """Return the options of groups by parameter: groups list their parameters in the order of their model."""
    options = {
        fqn: {option: value for option, value in group.items() if option != "params"}
        for group in optim["param_groups"]
        for fqn in group["params"]
    }
    return {"state": optim["state"], "options": options}


KINDS = [
    "orig",
    "orig+channels_last",
    "flat+channels_last",
    "flat",
    "orig+grad_op",
    "orig+ac",
    "orig+mesh",
    "flat+ac",
    "orig+none",
    "flat+none",
]


def _equal_to_plain(kind: str) -> None:
    model, optimizer = built(kind)
    reference, reference_optimizer = plain()
    assert sorted(get_model_state_dict(model)) == sorted(reference.state_dict())
    train(model, optimizer)
    train(reference, reference_optimizer)
    model(batch(9))  # A forward without backward leaves the root unsharded.
    state, optim = get_state_dict(model, optimizer, options=FULL)
    expected, expected_optim = get_state_dict(reference, reference_optimizer)
    close(dict(state), dict(expected))
    close(by_name(optim), by_name(expected_optim))
    assert state["head.weight"] is state["tied.weight"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_whole_state_is_the_plain_models(kind: str, world_size: int) -> None:
    run_ranks(world_size, _equal_to_plain, kind)


def test_hybrid_sharding_gives_the_plain_models_state() -> None:
    run_ranks(4, _equal_to_plain, "orig+hybrid")


def test_one_rank_has_plain_tensors() -> None:
    for kind in ("orig", "flat"):
        run_ranks(1, _one_rank, kind)


def _one_rank(kind: str) -> None:
    model, optimizer = built(kind)
    train(model, optimizer)
    state, optim = get_state_dict(model, optimizer)
    assert {type(value) for value in state.values()} <= {torch.Tensor}
    _equal_to_plain(kind)
    other, other_optimizer = built(kind)
    set_state_dict(other, other_optimizer, model_state_dict=state, optim_state_dict=optim)
    assert train(other, other_optimizer, first=3) == train(model, optimizer, first=3)


def _silent(kind: str) -> None:
    model, optimizer = built(kind)
    train(model, optimizer)
    names = dict(model.named_parameters())
    with DebugMode(record_torchfunction=False) as mode:
        state, optim = get_state_dict(model, optimizer)
    trace = mode.debug_string()
    for forbidden in ("c10d", "all_gather", "copy_", "clone"):
        if forbidden == "clone" and "flat" in kind:
            continue  # Step counts, which the parameters of a flat one share.
        assert forbidden not in trace, (forbidden, trace)
    mine = {parameter.untyped_storage().data_ptr() for parameter in names.values()}
    for fqn, value in state.items():
        if isinstance(value, ShardedTensor):
            for shard in value.local_shards():
                assert shard.tensor.untyped_storage().data_ptr() in mine, fqn
    held = sum(
        shard.tensor.numel() for v in set(state.values()) if isinstance(v, ShardedTensor) for shard in v.local_shards()
    )
    assert 0 < held < sum(value.numel() for value in Net().parameters())
    assert optim["state"]


@pytest.mark.parametrize("kind", ["orig", "flat"])
def test_sharded_state_is_views_of_the_flat_parameters_without_communication(kind: str) -> None:
    run_ranks(2, _silent, kind)


def _round_trip(directory: str, source: str, target: str) -> None:
    # The attributes of ShardedTensor warn that the class is deprecated. This package must not read them in users' runs.
    warnings.filterwarnings("error", category=FutureWarning, module="dcp_plugins")
    model, optimizer = built(source)
    train(model, optimizer)
    state, optim = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optim": optim}, checkpoint_id=directory)
    expected = train(model, optimizer, first=3)
    other, other_optimizer = built(target)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    state, optim = get_state_dict(other, other_optimizer)
    loaded = {"model": state, "optim": optim}
    dcp.load(loaded, checkpoint_id=directory)
    set_state_dict(other, other_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    assert train(other, other_optimizer, first=3) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("source", ["orig", "flat", "orig+none"])
@pytest.mark.parametrize("target", ["orig", "flat", "flat+none", "orig+ac"])
def test_a_checkpoint_moves_between_ways_of_wrapping(tmp_path: Path, source: str, target: str) -> None:
    run_ranks(2, _round_trip, str(tmp_path / "c"), source, target)


@pytest.mark.parametrize("kind", ["orig+hybrid", "orig+compiled", "orig+mixed"])
def test_a_checkpoint_of_other_kinds_resumes(tmp_path: Path, kind: str) -> None:
    run_ranks(4 if "hybrid" in kind else 2, _round_trip, str(tmp_path / "c"), kind, kind)


def _in_place(kind: str) -> None:
    model, optimizer = built(kind)
    train(model, optimizer)
    other, other_optimizer = built(kind)
    state, _optim = get_state_dict(other, other_optimizer)
    whole, whole_optim = get_state_dict(model, optimizer)
    set_state_dict(other, other_optimizer, model_state_dict=whole, optim_state_dict=whole_optim)
    assert train(other, other_optimizer, first=3) == train(model, optimizer, first=3)
    # The first getter's tensors are the model's memory still.
    for fqn, value in get_model_state_dict(other).items():
        if isinstance(value, ShardedTensor):
            for one, two in zip(value.local_shards(), state[fqn].local_shards(), strict=True):
                assert one.tensor.data_ptr() == two.tensor.data_ptr()


@pytest.mark.parametrize("kind", ["orig", "flat"])
def test_a_sharded_state_dict_loads_into_another_model_of_the_same_wrapping(kind: str) -> None:
    run_ranks(2, _in_place, kind)


def _with_stock(kind: str, directory: str) -> None:
    """Whole state dicts are equal and interchangeable; torch's sharded ones load into ours; its ``load`` reads ours."""
    model, optimizer = built(kind)
    train(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchs, torchs_optim = stock.get_state_dict(
            model, optimizer, options=stock.StateDictOptions(full_state_dict=True)
        )
    # Whole tensors that nobody had to gather, step counts, are the optimizer's own.
    ours, ours_optim = copy.deepcopy(get_state_dict(model, optimizer, options=FULL))
    assert sorted(ours) == sorted(torchs)
    assert all(torch.equal(ours[fqn], torchs[fqn]) for fqn in ours)
    for fqn, theirs in torchs_optim["state"].items():
        assert all(torch.equal(ours_optim["state"][fqn][name], value) for name, value in theirs.items())
    assert sorted(ours_optim["state"]) == sorted(torchs_optim["state"])
    expected = train(model, optimizer, first=3)

    other, other_optimizer = built(kind)
    set_state_dict(other, other_optimizer, model_state_dict=torchs, optim_state_dict=torchs_optim, options=FULL)
    assert train(other, other_optimizer, first=3) == expected

    other, other_optimizer = built(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock.set_state_dict(
            other,
            other_optimizer,
            model_state_dict=ours,
            optim_state_dict=ours_optim,
            options=stock.StateDictOptions(full_state_dict=True),
        )
    assert train(other, other_optimizer, first=3) == expected

    model, optimizer = built(kind)
    train(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchs, torchs_optim = stock.get_state_dict(model, optimizer)
    other, other_optimizer = built(kind)
    set_state_dict(other, other_optimizer, model_state_dict=torchs, optim_state_dict=torchs_optim)
    assert train(other, other_optimizer, first=3) == expected

    # Stock's load fills our sharded state dict in place from what stock's save has written, and the reverse.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock_dcp.save({"model": torchs, "optim": torchs_optim}, checkpoint_id=f"{directory}/torchs")
    other, other_optimizer = built(kind)
    state, optim = get_state_dict(other, other_optimizer)
    loaded = {"model": state, "optim": optim}
    dcp.load(loaded, checkpoint_id=f"{directory}/torchs")
    set_state_dict(other, other_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    assert train(other, other_optimizer, first=3) == expected

    other, other_optimizer = built(kind)
    train(other, other_optimizer)
    state, optim = get_state_dict(other, other_optimizer)
    dcp.save({"model": state, "optim": optim}, checkpoint_id=f"{directory}/ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        third, third_optimizer = built(kind)
        state, optim = stock.get_state_dict(third, third_optimizer)
        loaded = {"model": state, "optim": optim}
        stock_dcp.load(loaded, checkpoint_id=f"{directory}/ours")
        stock.set_state_dict(third, third_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    assert train(third, third_optimizer, first=3) == expected


@pytest.mark.parametrize("kind", ["orig", "flat", "orig+mesh"])
def test_state_dicts_are_interchangeable_with_torchs(tmp_path: Path, kind: str) -> None:
    run_ranks(2, _with_stock, kind, str(tmp_path))


def _frozen(kind: str) -> None:
    """A frozen block, an optimizer over the rest, groups with options of their own."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = wrapped(kind)
        for parameter in model.blocks[0].parameters():
            parameter.requires_grad_(False)
        groups = [
            {"params": list(model.blocks[1].parameters()), "lr": 0.02, "weight_decay": 0.5},
            {
                "params": [
                    parameter
                    for name, parameter in model.named_parameters()
                    if "blocks" not in name and parameter.requires_grad
                ]
            },
        ]
        return model, torch.optim.AdamW(groups, lr=0.01)

    model, optimizer = make()
    train(model, optimizer)
    state, optim = get_state_dict(model, optimizer, options=FULL)
    assert not any(fqn.startswith("blocks.0") for fqn in optim["state"])
    assert "blocks.1.first.weight" in optim["state"]
    only = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    assert "blocks.0.first.weight" not in only
    assert "blocks.0.offset" in only
    other, other_optimizer = make()
    other_optimizer.param_groups[0]["lr"] = 7.0
    set_state_dict(other, other_optimizer, model_state_dict=state, optim_state_dict=optim, options=FULL)
    assert [group["lr"] for group in other_optimizer.param_groups] == [0.02, 0.01]
    assert train(other, other_optimizer, first=3) == train(model, optimizer, first=3)


@pytest.mark.parametrize("kind", ["orig", "flat"])
def test_frozen_blocks_and_groups_keep_their_options(kind: str) -> None:
    run_ranks(2, _frozen, kind)


def _broadcast(kind: str) -> None:
    reference, reference_optimizer = plain()
    train(reference, reference_optimizer)
    given: tuple[Any, Any] = ({}, {})
    if dist.get_rank() == 0:
        given = get_state_dict(reference, reference_optimizer)
    model, optimizer = built(kind)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_state_dict(model, optimizer, model_state_dict=given[0], optim_state_dict=given[1], options=options)
    assert train(model, optimizer, first=3) == pytest.approx(train(reference, reference_optimizer, first=3), rel=1e-9)


@pytest.mark.parametrize("kind", ["orig", "flat"])
def test_rank_0_sends_a_plain_state_dict(kind: str) -> None:
    run_ranks(2, _broadcast, kind)


def _errors() -> None:
    model, optimizer = built("flat")
    whole, optim = get_state_dict(*plain())
    with pytest.raises(PlanError, match=r"full_state_dict=True"):
        set_model_state_dict(model, whole)
    with pytest.raises(PlanError, match=r"full_state_dict=True"):
        set_optimizer_state_dict(model, optimizer, optim)
    missing = {fqn: value for fqn, value in whole.items() if fqn != "blocks.0.first.weight"}
    with pytest.raises(PlanError, match=r'Missing key\(s\) in state_dict: "blocks.0.first.weight"'):
        set_model_state_dict(model, missing, options=FULL)
    wrong = {**whole, "blocks.0.first.weight": torch.zeros(2, 2)}
    with pytest.raises(PlanError, match=r"size mismatch for blocks.0.first.weight: found \(2, 2\), .* \(7, 5\)"):
        set_model_state_dict(model, wrong, options=FULL)
    optim["state"]["scale"]["step"] = torch.tensor(7.0)
    with pytest.raises(PlanError, match=r"different values of the state 'step'.*use_orig_params=True"):
        set_optimizer_state_dict(model, optimizer, optim, options=FULL)
    optim["state"]["scale"]["step"] = torch.tensor(0.0)
    optim["state"]["scale"]["exp_avg"] = torch.zeros(9)
    with pytest.raises(PlanError, match=r"size mismatch for the state scale.exp_avg: found \(9,\), expected \(3,\)"):
        set_optimizer_state_dict(model, optimizer, optim, options=FULL)
    del optim["state"]["scale"]
    optim["param_groups"][0]["params"].remove("scale")
    with pytest.raises(PlanError, match=r'Missing optimizer state for parameter\(s\) "scale"'):
        set_optimizer_state_dict(model, optimizer, optim, options=FULL)

    with FullyShardedDataParallel.summon_full_params(model), pytest.raises(PlanError, match="summon_full_params"):
        get_model_state_dict(model)

    other = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(PlanError, match="sharded otherwise"):
        set_model_state_dict(other, get_model_state_dict(model))


def test_errors_name_the_parameter_and_say_what_to_do() -> None:
    run_ranks(2, _errors)


def _hooks_stay() -> None:
    model, _ = built("orig")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = model.state_dict()
        get_model_state_dict(model)
        after = model.state_dict()
    assert_equal(dict(before), dict(after))
    assert after["blocks.0.first.weight"].shape == (7, 5)


def test_fsdp1s_own_state_dict_works_as_before() -> None:
    run_ranks(2, _hooks_stay)


def _to_fsdp2(directory: str, kind: str) -> None:
    model, optimizer = built(kind)
    train(model, optimizer)
    state, optim = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optim": optim}, checkpoint_id=directory)
    expected = train(model, optimizer, first=3)
    other = Net()
    for block in other.blocks:
        fully_shard(block)
    fully_shard(other)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.01)
    state, optim = get_state_dict(other, other_optimizer)
    loaded = {"model": state, "optim": optim}
    dcp.load(loaded, checkpoint_id=directory)
    set_state_dict(other, other_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    assert train(other, other_optimizer, first=3) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["orig", "flat"])
def test_a_run_moves_to_fsdp2(tmp_path: Path, kind: str) -> None:
    run_ranks(2, _to_fsdp2, str(tmp_path / "c"), kind)


def _over_tensor_parallel() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(4, 4))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(model, device_mesh=mesh["dp"], device_id=torch.device("cpu"))
        with pytest.raises(UnsupportedValueError, match="over tensor parallelism.*fully_shard"):
            get_model_state_dict(model)


def test_fsdp1_over_tensor_parallelism_is_refused_with_what_to_do() -> None:
    run_ranks(2, _over_tensor_parallel)


def _optimizer_state(kind: str) -> None:
    model, optimizer = built(kind)
    fresh = get_optimizer_state_dict(model, optimizer)
    assert not optimizer.state
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    assert {key.split(".")[0] for key in flat} == {"state", "param_groups"}
    assert all(isinstance(state["exp_avg"], ShardedTensor) for state in fresh["state"].values())
    train(model, optimizer)
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    other, other_optimizer = built(kind)
    set_model_state_dict(other, get_model_state_dict(model))
    set_optimizer_state_dict(other, other_optimizer, flat)
    assert train(other, other_optimizer, first=3) == train(model, optimizer, first=3)


@pytest.mark.parametrize("kind", ["orig", "flat"])
def test_flat_and_fresh_optimizer_state_work(kind: str) -> None:
    run_ranks(2, _optimizer_state, kind)
