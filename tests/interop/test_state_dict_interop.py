"""State dicts beside stock torch's: equal and interchangeable where torch's work, and what is wrong with the rest."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock_engine
import torch.distributed.checkpoint.state_dict as stock
from torch import nn

import dcp_plugins as dcp
from dcp_plugins import state_dict as ours
from dcp_plugins.errors import PlanError
from dcp_plugins.state_dict import StateDictOptions
from dcp_plugins.testing.ranks import run_ranks
from tests.ranks.wrapped_models import adamw, build, train, whole
from tests.unit.state_dict.samples import Net, assert_equal, groups_of, snapshot
from tests.unit.state_dict.samples import train as train_net

OPTIONS = [
    {},
    {"flatten_optimizer_state_dict": True},
    {"full_state_dict": True},
    {"full_state_dict": True, "flatten_optimizer_state_dict": True},
    {"full_state_dict": True, "cpu_offload": True},
    {"ignore_frozen_params": True},
]


def trained(kind: str, *, shared: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build(kind, shared=shared)
    optimizer = adamw(model)
    train(model, optimizer)
    return model, optimizer


def as_loaded(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's own state; torch makes lists of tuples in options."""
    state = optimizer.state_dict()
    groups = [{**group, "betas": tuple(group["betas"])} for group in state["param_groups"]]
    return {"state": state["state"], "param_groups": groups}


def _equal_and_interchangeable(kinds: list[str]) -> None:
    for kind in kinds:
        # Torch cannot set a module that has two names; its getters can get it.
        model, optimizer = trained(kind, shared=False)
        for chosen in OPTIONS:
            mine = ours.get_state_dict(model, optimizer, options=StateDictOptions(**chosen))
            theirs = stock.get_state_dict(model, optimizer, options=stock.StateDictOptions(**chosen))
            assert list(mine[0]) == list(theirs[0]), (kind, chosen)
            assert_equal(dict(mine[0]), dict(theirs[0]), f"{kind} {chosen}")
            assert_equal(mine[1], theirs[1], f"{kind} {chosen}")
        for full in (False, True):
            chosen = {"full_state_dict": full}
            for getter, setter in ((ours, stock), (stock, ours)):
                options: Any = getter.StateDictOptions(**chosen)
                state = copy.deepcopy(getter.get_state_dict(model, optimizer, options=options))
                other = build(kind, seed=4, shared=False)
                fresh = adamw(other, lr=9.0)
                setter.set_state_dict(
                    other,
                    fresh,
                    model_state_dict=state[0],
                    optim_state_dict=state[1],
                    options=setter.StateDictOptions(**chosen),
                )
                where = f"{kind} {setter.__name__} full={full}"
                one, two = (ours.get_model_state_dict(each) for each in (other, model))
                assert_equal(dict(one), dict(two), where)
                assert_equal(as_loaded(fresh), as_loaded(optimizer), where)


@pytest.mark.parametrize(
    ("world_size", "kinds"),
    [
        (2, ["ddp", "compiled-in-place"]),
        (2, ["fsdp2", "fsdp2-offload", "fsdp2-compiled-in-place"]),
        (2, ["tp", "tp-tied"]),
        (4, ["hsdp"]),
    ],
)
def test_state_dicts_are_equal_and_interchangeable(world_size: int, kinds: list[str]) -> None:
    run_ranks(world_size, _equal_and_interchangeable, kinds)


def _shared(kind: str) -> None:
    model, optimizer = trained(kind)
    full = {"full_state_dict": True}
    mine = ours.get_state_dict(model, optimizer, options=StateDictOptions(**full))
    theirs = stock.get_state_dict(model, optimizer, options=stock.StateDictOptions(**full))
    assert_equal(dict(mine[0]), dict(theirs[0]))
    assert_equal(mine[1], theirs[1])
    other = build(kind, seed=4)
    assert ours.set_model_state_dict(other, copy.deepcopy(mine[0]), options=StateDictOptions(**full)) == ([], [])
    assert_equal(dict(ours.get_model_state_dict(other)), dict(ours.get_model_state_dict(model)))
    with pytest.raises(RuntimeError, match="again"):
        stock.set_model_state_dict(other, dict(mine[0]), options=stock.StateDictOptions(**full))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_module_with_two_names_can_be_set_where_torch_fails(kind: str) -> None:
    run_ranks(2, _shared, kind)


def _through_files(folder: str) -> None:
    for at, (engine, functions, other_engine, others) in enumerate(
        ((dcp, ours, stock_engine, stock), (stock_engine, stock, dcp, ours))
    ):
        model, optimizer = trained("fsdp2")
        state = dict(zip(("model", "optimizer"), functions.get_state_dict(model, optimizer), strict=True))
        engine.save(state, checkpoint_id=f"{folder}{at}")
        other = build("tp-tied", seed=4)
        fresh = adamw(other, lr=9.0)
        loaded = dict(zip(("model", "optimizer"), others.get_state_dict(other, fresh), strict=True))
        other_engine.load(loaded, checkpoint_id=f"{folder}{at}")
        others.set_state_dict(other, fresh, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        full = StateDictOptions(full_state_dict=True)
        one, two = (ours.get_state_dict(*each, options=full) for each in ((model, optimizer), (other, fresh)))
        assert_equal(dict(one[0]), dict(two[0]))
        assert_equal(one[1]["state"], two[1]["state"])


def test_each_sides_checkpoints_load_into_the_others_state_dicts(tmp_path: Any) -> None:
    run_ranks(2, _through_files, str(tmp_path / "c"))


def _renamed_by_wrapping(kinds: list[str]) -> None:
    plain = set(build("plain").state_dict())
    for kind in kinds:
        model = build(kind)
        assert set(ours.get_model_state_dict(model)) == plain, kind
        extra = ".module." if kind == "checkpointed-ddp" else "_orig_mod"
        assert any(extra in f".{key}" for key in stock.get_model_state_dict(model)), kind


def test_wrappers_in_another_order_leave_no_trace_where_torch_keeps_theirs() -> None:
    run_ranks(2, _renamed_by_wrapping, ["ddp-of-mixed-up", "fsdp2-of-mixed-up", "checkpointed-ddp"])


def test_a_state_dict_keeps_its_keys_when_it_is_set_where_torch_renames_them() -> None:
    model: Any = torch.compile(Net(), backend="eager")
    state = dict(ours.get_model_state_dict(Net()))
    before = dict(state)
    ours.set_model_state_dict(model, state)
    assert list(state) == list(before)
    assert all(state[key] is before[key] for key in before)
    stock.set_model_state_dict(model, state)
    assert not set(state) & set(before)


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.05)


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k in ("lr", "weight_decay")} for group in optimizer.param_groups]


def test_a_group_that_is_split_is_refused_or_keeps_its_options_where_torch_leaves_them_to_the_last_part() -> None:
    model = Net()
    matrices, others = groups_of(model)
    optimizer = _adamw([matrices, others])
    train_net(model, optimizer)
    state = ours.get_optimizer_state_dict(model, optimizer)
    split = [{**matrices, "params": matrices["params"][at::2]} for at in (0, 1)]
    mine, theirs = (_adamw([*split, others]) for _ in range(2))
    with pytest.raises(PlanError, match=r"Expected 3 parameter group\(s\).*Found 2"):
        ours.set_optimizer_state_dict(model, mine, snapshot(state))
    ours.set_optimizer_state_dict(model, mine, snapshot(state), options=ours.StateDictOptions(strict=False))
    assert _options(mine) == [{"lr": 0.05, "weight_decay": 0.1}] * 2 + [{"lr": 0.002, "weight_decay": 0.0}]
    train_net(model, mine, steps=1)
    stock.set_optimizer_state_dict(model, theirs, snapshot(state))
    assert _options(theirs)[0] == {}
    with pytest.raises(KeyError):
        train_net(model, theirs, steps=1)


@pytest.mark.parametrize("flat", [False, True])
def test_groups_that_are_merged_are_refused_where_torch_keeps_the_options_of_one(flat: bool) -> None:
    model = Net()
    optimizer = _adamw(groups_of(model))
    train_net(model, optimizer)
    options = stock.StateDictOptions(flatten_optimizer_state_dict=flat)
    state = stock.get_optimizer_state_dict(model, optimizer, options=options)
    mine, theirs = (torch.optim.AdamW(model.parameters(), lr=9.0) for _ in range(2))
    with pytest.raises(RuntimeError, match=r"group 0 of AdamW.*'weight_decay' \(0.1 for some, 0.0 for others\)"):
        ours.set_optimizer_state_dict(model, mine, snapshot(state))
    stock.set_optimizer_state_dict(model, theirs, snapshot(state), options=options)
    # The rate of one group with the decay, or without it, for all.
    assert _options(theirs) in ([{"lr": 0.05, "weight_decay": 0.1}], [{"lr": 0.002, "weight_decay": 0.0}])


def test_a_scheduler_that_marks_groups_since_the_save_can_load_flat_state_where_torch_cannot() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train_net(model, optimizer)
    options = stock.StateDictOptions(flatten_optimizer_state_dict=True)
    state = stock.get_optimizer_state_dict(model, optimizer, options=options)
    mine, theirs = (torch.optim.AdamW(model.parameters(), lr=0.05) for _ in range(2))
    for one in (mine, theirs):
        torch.optim.lr_scheduler.StepLR(one, 1)
    ours.set_optimizer_state_dict(model, mine, snapshot(state))
    assert mine.param_groups[0]["initial_lr"] == 0.05
    with pytest.raises(KeyError, match="initial_lr"):
        stock.set_optimizer_state_dict(model, theirs, snapshot(state), options=options)


def test_asking_fires_no_hooks_and_steps_nothing_where_torch_steps() -> None:
    fired: list[str] = []

    def asked(functions: Any) -> tuple[torch.optim.Optimizer, Any]:
        fired.clear()
        model = Net()
        optimizer = _adamw(groups_of(model))
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
        optimizer.register_step_post_hook(lambda *_: fired.append("step"))
        return optimizer, functions.get_optimizer_state_dict(model, optimizer)

    optimizer, state = asked(ours)
    assert not fired
    assert not optimizer.state
    assert not getattr(optimizer, "_opt_called", False)
    assert state["state"]["last.weight"]["step"] == 0
    optimizer, state = asked(stock)
    assert fired == ["step"]
    assert optimizer.state
    # A scheduler takes this for the first step, and no longer warns of a wrong order.
    assert getattr(optimizer, "_opt_called", False)
    assert state["state"]["last.weight"]["step"] == 1


def test_state_is_found_beside_gradients_where_torch_finds_none() -> None:
    model = Net()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    mine: Any = ours.get_optimizer_state_dict(model, torch.optim.Adam(model.parameters()))
    theirs: Any = stock.get_optimizer_state_dict(model, torch.optim.Adam(model.parameters()))
    assert set(mine["state"]) == {name for name, _ in model.named_parameters()}
    assert theirs["state"] == {}


def _frozen_since() -> None:
    model, optimizer = trained("fsdp2")
    model.requires_grad_(False)
    state: Any = ours.get_optimizer_state_dict(model, optimizer)
    mine, theirs = adamw(model, lr=9.0), adamw(model, lr=9.0)
    ours.set_optimizer_state_dict(model, mine, state)
    assert_equal(as_loaded(mine), as_loaded(optimizer))
    stock.set_optimizer_state_dict(model, theirs, snapshot(state))
    assert not theirs.state
    assert dist.get_world_size() == 2
    assert len(whole(state)["state"]) == len(optimizer.state)


def test_state_of_frozen_parameters_is_kept_sharded_where_torch_drops_it() -> None:
    run_ranks(2, _frozen_since)
