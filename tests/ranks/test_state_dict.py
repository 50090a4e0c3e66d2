"""State dicts of parallel models, on real ranks, beside those of the plain model and of stock torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as stock
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._debug_mode import DebugMode

from dcp_plugins.errors import PlanError
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
from tests.unit.state_dict.samples import assert_equal, snapshot


class Small(nn.Module):
    """Uneven sizes, a tied pair, a buffer and extra state; the same on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.up = nn.Linear(5, 6)
        self.down = nn.Linear(6, 7, bias=False)
        self.out = nn.Linear(7, 3)
        self.register_buffer("mean", torch.ones(3))
        self.note = "fresh"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.down(self.up(x).relu())) * self.mean

    def get_extra_state(self) -> dict[str, Any]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.note = state["note"]


def build(kind: str) -> nn.Module:
    """Wrap the model as ``kind`` says, on as many ranks as there are."""
    world_size = dist.get_world_size()
    model: nn.Module = Small()
    if kind.startswith(("compiled-", "reversed-")):
        model.down = torch.compile(checkpoint_wrapper(model.down), backend="eager")
        compiled = torch.compile(model.up, backend="eager")
        # Torch's own names keep `_orig_mod` in the second.
        model.up = compiled if kind.startswith("compiled-") else checkpoint_wrapper(compiled)
        kind = kind.split("-")[1]
        if kind == "ddp":
            return DistributedDataParallel(torch.compile(model, backend="eager"))
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "tp" or kind == "fsdp2-tp":
        mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return shard(model, mesh["dp"]) if kind == "fsdp2-tp" else model
    if kind == "fsdp2":
        return shard(model, init_device_mesh("cpu", (world_size,)))
    if kind == "hsdp":
        return shard(model, init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard")))
    assert kind == "plain"
    return model


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(model.up, mesh=mesh)
    fully_shard(model.down, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def adamw(model: nn.Module, lr: float = 0.02) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "initial_lr": 0.5}],
        lr=lr,
        foreach=False,
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        model(torch.randn(4, 5, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build(kind)
    optimizer = adamw(model)
    train(model, optimizer)
    return model, optimizer


def whole(tree: Any) -> Any:
    """Gather every DTensor of a tree, as the reference for what the getters gather."""
    if isinstance(tree, DTensor):
        return tree.full_tensor().detach()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    return tree


KINDS = [
    (2, "ddp"),
    (2, "fsdp2"),
    (2, "tp"),
    (2, "compiled-ddp"),
    (2, "compiled-fsdp2"),
    (4, "hsdp"),
    (4, "fsdp2-tp"),
]
OURS_ONLY = [(2, "reversed-ddp"), (2, "reversed-fsdp2")]


def _keys_and_values(kind: str) -> None:
    model, optimizer = trained(kind)
    plain = Small()
    plain_optimizer = adamw(plain)
    train(plain, plain_optimizer)
    state, optimizer_state = get_state_dict(model, optimizer)
    assert set(state) == set(plain.state_dict())
    expected: Any = get_optimizer_state_dict(plain, plain_optimizer)
    assert_equal(
        [g["params"] for g in optimizer_state["param_groups"]], [g["params"] for g in expected["param_groups"]]
    )
    assert set(optimizer_state["state"]) == set(expected["state"])
    full = StateDictOptions(full_state_dict=True)
    assert_equal(dict(get_model_state_dict(model, options=full)), whole(dict(state)))
    assert_equal(get_optimizer_state_dict(model, optimizer, options=full), whole(optimizer_state))
    if kind.startswith("reversed-"):
        assert any("_orig_mod" in key for key in stock.get_model_state_dict(model))
        return
    assert_equal(dict(state), dict(stock.get_model_state_dict(model)))
    assert_equal(optimizer_state, stock.get_optimizer_state_dict(model, optimizer))
    for flat in (False, True):
        options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=flat)
        ours, theirs = (
            get_state_dict(model, optimizer, options=options),
            stock.get_state_dict(model, optimizer, options=options),
        )
        assert_equal(dict(ours[0]), dict(theirs[0]))
        assert_equal(ours[1], theirs[1])


@pytest.mark.parametrize(("world_size", "kind"), [*KINDS, *OURS_ONLY])
def test_keys_are_the_plain_models_and_values_are_torchs(world_size: int, kind: str) -> None:
    run_ranks(world_size, _keys_and_values, kind)


def _interchange(kind: str) -> None:
    model, optimizer = trained(kind)
    for full in (False, True):
        options = StateDictOptions(full_state_dict=full)
        for getter, setter in ((get_state_dict, stock.set_state_dict), (stock.get_state_dict, set_state_dict)):
            state, optimizer_state = snapshot(getter(model, optimizer, options=options))
            other = build(kind)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.zero_()
            fresh = adamw(other, lr=9.0)
            setter(other, fresh, model_state_dict=state, optim_state_dict=optimizer_state, options=options)
            assert_equal(dict(other.state_dict()), dict(model.state_dict()))
            loaded = fresh.state_dict()
            for group in loaded["param_groups"]:
                group["betas"] = tuple(group["betas"])  # Torch makes lists of tuples.
            assert_equal(loaded, optimizer.state_dict())


INTERCHANGED = [kind for kind in KINDS if kind[1] not in ("fsdp2-tp", "compiled-ddp")]


@pytest.mark.parametrize(("world_size", "kind"), INTERCHANGED)
def test_state_dicts_are_interchangeable_with_torchs(world_size: int, kind: str) -> None:
    run_ranks(world_size, _interchange, kind)


def _whole_to_any(kind: str, broadcast: bool) -> None:
    plain = Small()
    plain.note = "saved"
    plain_optimizer = adamw(plain, lr=0.25)
    train(plain, plain_optimizer)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    state, optimizer_state = snapshot(get_state_dict(plain, plain_optimizer))
    if broadcast and dist.get_rank() != 0:
        state, optimizer_state = {}, {}
    for live in (False, True):
        model = build(kind)
        optimizer = adamw(model)
        if live:
            train(model, optimizer, 1)
        parameters = list(model.parameters())
        found = set_state_dict(
            model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state, options=options
        )
        assert found == ([], [])
        assert all(one is two for one, two in zip(parameters, model.parameters(), strict=True))
        full = StateDictOptions(full_state_dict=True)
        back = get_state_dict(model, optimizer, options=full)
        expected = get_state_dict(plain, plain_optimizer, options=full)
        assert_equal(dict(back[0]), dict(expected[0]))
        assert_equal(back[1], expected[1])


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize(("world_size", "kind"), [*KINDS, *OURS_ONLY, (2, "plain")])
def test_whole_state_loads_into_any_parallelism(world_size: int, kind: str, broadcast: bool) -> None:
    run_ranks(world_size, _whole_to_any, kind, broadcast)


def _offload() -> None:
    model, optimizer = trained("fsdp2")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state, optimizer_state = get_state_dict(model, optimizer, options=options)
    theirs = stock.get_state_dict(model, optimizer, options=options)
    assert_equal(dict(state), dict(theirs[0]))
    assert_equal(optimizer_state, theirs[1])
    if dist.get_rank() == 0:
        assert not any(isinstance(value, DTensor) for value in state.values())
    else:
        assert state == {}
        assert optimizer_state == {}
    sharded = get_model_state_dict(model, options=StateDictOptions(cpu_offload=True))
    assert isinstance(sharded["up.weight"], DTensor)


def test_full_and_offloaded_state_is_on_rank_0_only() -> None:
    run_ranks(2, _offload)


def _silent() -> None:
    model, optimizer = trained("fsdp2")
    # A forward without backward leaves the root's parameters gathered.
    with torch.no_grad():
        model(torch.randn(2, 5))
    with DebugMode() as mode:
        optimizer_state: Any = get_optimizer_state_dict(model, optimizer)
        state = get_model_state_dict(model)
        fresh: Any = get_optimizer_state_dict(model, adamw(model))
    seen = mode.debug_string()
    assert "c10d" not in seen, seen
    assert "copy_" not in get_trace(lambda: get_state_dict(model, optimizer))
    for name, parameter in model.named_parameters():
        assert state[name].to_local().data_ptr() == parameter.to_local().data_ptr()
        mine = optimizer.state[parameter]["exp_avg"]
        assert optimizer_state["state"][name]["exp_avg"] is mine
        other = fresh["state"][name]["exp_avg"]
        assert isinstance(other, DTensor)
        assert other.placements == parameter.placements


def get_trace(act: Any) -> str:
    with DebugMode() as mode:
        act()
    return mode.debug_string()


def test_getting_sharded_state_copies_and_communicates_nothing() -> None:
    run_ranks(2, _silent)


def _continue(source: str, target: str) -> list[float]:
    model, optimizer = trained(source)
    options = StateDictOptions(full_state_dict=True)
    state, optimizer_state = get_state_dict(model, optimizer, options=options)
    other = build(target)
    fresh = adamw(other, lr=9.0)
    set_state_dict(other, fresh, model_state_dict=state, optim_state_dict=optimizer_state, options=options)
    train(model, optimizer)
    train(other, fresh)
    one, two = (dict(get_model_state_dict(m, options=options)) for m in (model, other))
    for key in one:
        if isinstance(one[key], torch.Tensor):
            torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-6)
    return [value.sum().item() for value in two.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(("source", "target"), [("ddp", "fsdp2"), ("fsdp2", "ddp"), ("fsdp2", "tp"), ("tp", "plain")])
def test_training_continues_under_another_parallelism(source: str, target: str) -> None:
    run_ranks(2, _continue, source, target)


def _meta(broadcast: bool, sharded: bool) -> None:
    plain = Small()
    with torch.no_grad():
        plain.up.weight.add_(1)
    plain.note = "saved"
    source: nn.Module = plain
    with torch.device("meta"):
        model = Small()
    model = shard(model, init_device_mesh("cpu", (2,)))
    model.out.bias.requires_grad_(False)
    options = StateDictOptions(full_state_dict=not sharded, broadcast_from_rank0=broadcast)
    if sharded:
        source = shard(copy.deepcopy(plain), init_device_mesh("cpu", (2,)))
    state = get_model_state_dict(source)
    # A buffer is no business of fully_shard's.
    set_model_state_dict(model, {} if broadcast and dist.get_rank() else state, options=options)
    full = StateDictOptions(full_state_dict=True)
    assert_equal(dict(get_model_state_dict(model, options=full)), dict(plain.state_dict()))
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not model.out.bias.requires_grad
    train(model, adamw(model))


@pytest.mark.parametrize(("broadcast", "sharded"), [(False, False), (True, False), (False, True)])
def test_a_sharded_model_on_meta_is_filled_and_trains(broadcast: bool, sharded: bool) -> None:
    run_ranks(2, _meta, broadcast, sharded)


def _errors() -> None:
    model, optimizer = trained("fsdp2")
    full = StateDictOptions(full_state_dict=True)
    state, optimizer_state = snapshot(get_state_dict(model, optimizer, options=full))
    with pytest.raises(PlanError, match=r"found plain tensors.*up.weight.*full_state_dict=True"):
        set_model_state_dict(model, state)
    with pytest.raises(PlanError, match=r"Expected a DTensor for the state .*full_state_dict=True"):
        set_optimizer_state_dict(model, optimizer, optimizer_state)
    with pytest.raises(PlanError, match=r"found sharded ones.*up.weight"):
        set_model_state_dict(Small(), get_model_state_dict(model))
    plain = Small()
    with pytest.raises(PlanError, match=r"found a DTensor.*full_state_dict=True"):
        set_optimizer_state_dict(plain, adamw(plain), get_optimizer_state_dict(model, optimizer))

    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    # What only rank 0 can see reaches all.
    with pytest.raises(RuntimeError, match=r"size mismatch for up.weight: found \(6, 9\), the model has \(6, 5\)"):
        set_model_state_dict(model, {**state, "up.weight": torch.zeros(6, 9)}, options=broadcast)
    with pytest.raises(RuntimeError, match="Unexpected key.*more"):
        set_model_state_dict(model, {**state, "more": torch.zeros(1)}, options=broadcast)
    with pytest.raises((PlanError, ValueError), match="expects whole tensors, found a DTensor"):
        set_model_state_dict(model, get_model_state_dict(model), options=broadcast)
    with pytest.raises(RuntimeError, match="Missing key.*up.weight"):
        set_model_state_dict(model, {}, options=broadcast)
    found = set_model_state_dict(
        model,
        {"more": torch.zeros(1)} if dist.get_rank() == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False),
    )
    assert found.unexpected_keys == ["more"]
    assert "up.weight" in found.missing_keys
    # A problem on one rank alone reaches all too.
    mine = model
    if dist.get_rank() == 1:
        mine = copy.deepcopy(Small())
        mine.up = nn.Linear(2, 6)
    with pytest.raises(RuntimeError, match="size mismatch for up.weight"):
        set_model_state_dict(mine, state, options=broadcast)


def test_errors_say_what_to_do_and_reach_every_rank() -> None:
    run_ranks(2, _errors)


def _before_sharding() -> None:
    model = Small()
    optimizer = adamw(model)
    shard(model, init_device_mesh("cpu", (2,)))
    with pytest.raises(PlanError, match=r"parameter 0 of group 0 of AdamW.*made after the model has been"):
        get_optimizer_state_dict(model, optimizer)


def test_an_optimizer_made_before_sharding_is_refused() -> None:
    run_ranks(2, _before_sharding)


def _partly_trained() -> None:
    model = build("fsdp2")
    model.out.weight.requires_grad_(False)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    initial: Any = get_optimizer_state_dict(model, optimizer)
    assert "out.weight" not in initial["state"]
    assert "row_var" in initial["state"]["up.weight"]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    begin: Any = get_optimizer_state_dict(model, sgd)
    assert isinstance(begin["state"]["up.weight"]["momentum_buffer"], DTensor)
    assert all(parameter.grad is None for parameter in model.parameters())
    for options in (StateDictOptions(), StateDictOptions(full_state_dict=True)):
        train(model, sgd)
        state = snapshot(get_optimizer_state_dict(model, sgd, options=options))
        fresh = torch.optim.SGD(model.parameters(), lr=3.0, momentum=0.1)
        set_optimizer_state_dict(model, fresh, state, options=options)
        assert_equal(fresh.state_dict(), sgd.state_dict())


def test_frozen_parameters_and_other_optimizers_work_sharded() -> None:
    run_ranks(2, _partly_trained)
