"""Optimizers of every kind over sharded models: saved, loaded into fresh ones, and stepped on."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dcp_plugins as dcp
from dcp_plugins.errors import PlanError
from dcp_plugins.state_dict import (
    StateDictOptions,
    _patch_model_state_dict,
    _patch_optimizer_state_dict,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from dcp_plugins.testing.ranks import run_ranks
from tests.ranks.wrapped_models import adamw, build, train, whole
from tests.unit.state_dict.samples import assert_equal, snapshot

FULL = StateDictOptions(full_state_dict=True)
Makers = Callable[[nn.Module], list[torch.optim.Optimizer]]


class Remembering(torch.optim.Optimizer):
    """In the style of third parties: nested state, numbers, text and lists among the tensors, a counter of its own."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "mode": "slow", "window": (2, 3)})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, phase="warm", anchor=p.clone(), sums={0: {"g": torch.zeros_like(p)}}, seen=[])
                state["step"] += 1
                state["phase"] = "hot" if state["step"] > 1 else "warm"
                state["sums"][0]["g"].add_(p.grad)
                state["seen"] = [*state["seen"], state["step"]][-2:]
                pull = 0.5 if state["phase"] == "hot" else 0.25
                p.sub_((state["sums"][0]["g"] + (p - state["anchor"]) * pull) * (group["lr"] * state["seen"][0]))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 0.003}]


def matrices_and_others(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, others = (group["params"] for group in groups_of(model))
    return [torch.optim.Muon(matrices, lr=0.01), torch.optim.SGD(others, lr=0.1, momentum=0.9)]


def unevenly_tuned(model: nn.Module) -> list[torch.optim.Optimizer]:
    (matrices, others), lr = groups_of(model), torch.tensor([0.01])
    return [torch.optim.AdamW([matrices, {**others, "lr": torch.tensor(0.003)}], lr=lr, foreach=False)]


def partly(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam([p for p in model.parameters() if p.dim() > 1], lr=0.01)]


MAKERS: dict[str, Makers] = {
    "sgd": lambda m: [torch.optim.SGD(groups_of(m), lr=0.1)],
    "momentum": lambda m: [torch.optim.SGD(groups_of(m), lr=0.1, momentum=0.9, nesterov=True)],
    "adam-amsgrad": lambda m: [torch.optim.Adam(groups_of(m), lr=0.01, amsgrad=True)],
    "adamw-foreach": lambda m: [torch.optim.AdamW(groups_of(m), lr=0.01, foreach=True)],
    "adamw-fused": lambda m: [torch.optim.AdamW(groups_of(m), lr=0.01, fused=True)],
    "tensor-lr": unevenly_tuned,
    "remembering": lambda m: [Remembering(m.parameters())],
    "muon-and-sgd": matrices_and_others,
    "partly": partly,
}


def _numbers(value: Any) -> Any:
    """The same state, up to what another order of summation does to it."""
    if isinstance(value, torch.Tensor):
        return value.double()
    if isinstance(value, dict):
        return {key: _numbers(element) for key, element in value.items()}
    return value


def assert_close(first: Any, second: Any) -> None:
    # Muon computes in bfloat16.
    torch.testing.assert_close(_numbers(first), _numbers(second), rtol=1e-2, atol=1e-3)


def tensors_of(model: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in whole(dict(get_model_state_dict(model))).items() if "_extra" not in key}


def _continued(name: str, flat: bool, folder: str) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = build("fsdp2")
    optimizers = MAKERS[name](model)
    train(model, *optimizers)
    model_state, optimizer_state = get_state_dict(model, optimizers, options=options)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    expected = whole(optimizer_state)
    runs = []
    for kind in ("fsdp2", "plain", "tp-tied"):
        if name in ("adamw-foreach", "adamw-fused") and kind == "tp-tied":
            continue  # Its lists would mix DTensors and tensors.
        other = build(kind, seed=4)
        fresh = MAKERS[name](other)
        for one in fresh:
            for group in one.param_groups:
                group["lr"] = group["lr"] * 7
        state = dict(zip(("model", "optimizer"), get_state_dict(other, fresh, options=options), strict=True))
        dcp.load(state, checkpoint_id=folder)
        found = set_state_dict(other, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        assert found == ([], [])
        assert_equal(whole(get_optimizer_state_dict(other, fresh, options=options)), expected)
        runs.append((kind, other, fresh))
    train(model, *optimizers)
    for kind, other, fresh in runs:
        train(other, *fresh)
        (assert_equal if kind == "fsdp2" else assert_close)(tensors_of(other), tensors_of(model))


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_continues_sharded_and_not(tmp_path: Any, name: str) -> None:
    run_ranks(2, _continued, name, name in ("tensor-lr", "momentum"), str(tmp_path / "c"))


def _factored(folder: str) -> None:
    plain = build("plain")
    optimizer = torch.optim.Adafactor(groups_of(plain), lr=0.01)
    train(plain, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(plain, optimizer), strict=True)), checkpoint_id=folder)
    expected = snapshot(get_optimizer_state_dict(plain, optimizer))
    for kind in ("fsdp2", "tp-tied"):
        model = build(kind, seed=4)
        sharded = torch.optim.Adafactor(groups_of(model), lr=3.0)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, sharded), strict=True))
        assert isinstance(state["optimizer"]["state"]["blocks.0.up.weight"]["row_var"], DTensor)
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, sharded, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        assert_equal(get_optimizer_state_dict(model, sharded, options=FULL), expected)
        # A whole state dict, without the engine, into what has state and into what has none.
        for fresh in (sharded, torch.optim.Adafactor(groups_of(model), lr=3.0)):
            set_optimizer_state_dict(model, fresh, expected, options=FULL)
            assert_equal(get_optimizer_state_dict(model, fresh, options=FULL), expected)
        dcp.save(
            dict(zip(("model", "optimizer"), get_state_dict(model, sharded), strict=True)),
            checkpoint_id=f"{folder}{kind}",
        )
        other = build("plain", seed=4)
        again = torch.optim.Adafactor(groups_of(other), lr=3.0)
        state = dict(zip(("model", "optimizer"), get_state_dict(other, again), strict=True))
        dcp.load(state, checkpoint_id=f"{folder}{kind}")
        set_state_dict(other, again, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        origin = build("plain")
        reference = torch.optim.Adafactor(groups_of(origin), lr=0.01)
        train(origin, reference)
        train(origin, reference)
        train(other, again)
        assert_equal(tensors_of(other), tensors_of(origin))


def test_adafactors_rows_and_columns_move_through_sharded_models(tmp_path: Any) -> None:
    # torch.optim.Adafactor cannot step DTensors that are sharded along rows; its state must move all the same.
    run_ranks(2, _factored, str(tmp_path / "c"))


def _untouched(name: str) -> None:
    model = build("fsdp2")
    optimizers = MAKERS[name](model)
    schedulers = [torch.optim.lr_scheduler.StepLR(one, 1) for one in optimizers]
    fired: list[str] = []
    for one in optimizers:
        one.register_step_pre_hook(lambda *_: fired.append("pre"))
        one.register_step_post_hook(lambda *_: fired.append("post"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _: fired.append("grad"))
    gradients = [torch.ones_like(p) if p.requires_grad else None for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    before = snapshot([one.state_dict() for one in (*optimizers, *schedulers)])
    values = whole(dict(get_model_state_dict(model)))
    randomness = (torch.get_rng_state(), random.getstate())

    state: Any = get_optimizer_state_dict(model, optimizers)

    assert fired == []
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert_equal([one.state_dict() for one in (*optimizers, *schedulers)], before)
    assert_equal(whole(dict(get_model_state_dict(model))), values)
    assert torch.equal(torch.get_rng_state(), randomness[0])
    assert random.getstate() == randomness[1]
    for fqn, one in state["state"].items():
        assert int(one.get("step", 0)) == 0, fqn
        shaped = [value for value in one.values() if isinstance(value, torch.Tensor) and value.dim()]
        assert all(isinstance(value, DTensor) for value in shaped), fqn


@pytest.mark.parametrize("name", ["adamw-foreach", "remembering", "muon-and-sgd"])
def test_asking_a_sharded_optimizer_what_it_begins_with_changes_nothing(name: str) -> None:
    run_ranks(2, _untouched, name)


def _regrouped(folder: str) -> None:
    model = build("fsdp2")
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.01)
    train(model, optimizer)
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        state = get_optimizer_state_dict(model, optimizer, options=options)
        matrices, others = groups_of(model)
        halves = [{**matrices, "params": matrices["params"][at::2][::-1]} for at in (0, 1)]
        fresh = torch.optim.AdamW([others, *halves], lr=9.0)
        if not flat:
            with pytest.raises(PlanError, match=r"Expected 3 parameter group\(s\).*Found 2"):
                set_optimizer_state_dict(model, fresh, state)
        set_optimizer_state_dict(model, fresh, state, options=StateDictOptions(strict=flat))
        assert [group["lr"] for group in fresh.param_groups] == [0.003, 0.01, 0.01]
        for parameter in model.parameters():
            assert_equal(fresh.state.get(parameter, {}), optimizer.state.get(parameter, {}))
    # Through a checkpoint the flat form does not depend on the groups.
    flat_options = StateDictOptions(flatten_optimizer_state_dict=True)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=flat_options)}, checkpoint_id=folder)
    other = build("tp-tied", seed=4)
    matrices, others = groups_of(other)
    fresh = torch.optim.AdamW([others, {**matrices, "params": matrices["params"][::-1]}], lr=9.0)
    state = {"optimizer": get_optimizer_state_dict(other, fresh, options=flat_options)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(other, fresh, state["optimizer"])
    assert [group["lr"] for group in fresh.param_groups] == [0.003, 0.01]
    expected = whole(get_optimizer_state_dict(model, optimizer, options=flat_options))
    assert_equal(whole(get_optimizer_state_dict(other, fresh, options=flat_options)), expected)


def test_groups_may_be_reordered_and_split_between_save_and_load(tmp_path: Any) -> None:
    run_ranks(2, _regrouped, str(tmp_path / "c"))


def _broadcast() -> None:
    """Everything that is not a tensor of a parameter's size must arrive too."""
    model = build("fsdp2")
    for name in ("tensor-lr", "remembering"):
        optimizers = MAKERS[name](model)
        train(model, *optimizers)
        for flat in (False, True):
            options = StateDictOptions(
                full_state_dict=True, broadcast_from_rank0=True, flatten_optimizer_state_dict=flat
            )
            state = get_optimizer_state_dict(model, optimizers, options=options)
            expected = snapshot(state)
            fresh = MAKERS[name](model)
            for group in fresh[0].param_groups:
                group["lr"] = group["lr"] * 5
            set_optimizer_state_dict(model, fresh, state if dist.get_rank() == 0 else {}, options=options)
            assert_equal(get_optimizer_state_dict(model, fresh, options=options), expected)


def test_rank_0_sends_options_and_nested_state_as_well() -> None:
    run_ranks(2, _broadcast)


def _some_without() -> None:
    model = build("fsdp2")
    for parameter in model.blocks[1].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.01)
    train(model, optimizer)
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)  # Frozen since: what it has is kept.
    for options in (StateDictOptions(), FULL, StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)):
        state: Any = get_optimizer_state_dict(model, optimizer, options=options)
        assert "blocks.0.up.weight" in state["state"]
        assert "blocks.1.up.weight" not in state["state"]
        fresh = torch.optim.AdamW(groups_of(model), lr=9.0)
        set_optimizer_state_dict(model, fresh, state, options=options)
        assert_equal(fresh.state_dict(), optimizer.state_dict())
    lesser = StateDictOptions(ignore_frozen_params=True)
    kept = get_model_state_dict(model, options=lesser)
    assert not any(name.startswith("blocks") and name.endswith(("weight", "bias")) for name in kept)
    before = whole(dict(get_model_state_dict(model)))
    assert set_model_state_dict(model, kept, options=lesser) == ([], [])
    assert_equal(whole(dict(get_model_state_dict(model))), before)
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks.0.down.bias"):
        set_model_state_dict(model, kept)


def test_parameters_without_state_and_frozen_ones_with_it_load_sharded() -> None:
    run_ranks(2, _some_without)


def _patched(folder: str) -> None:
    model = build("fsdp2-of-mixed-up")
    optimizers = MAKERS["muon-and-sgd"](model)
    _patch_model_state_dict(model)
    _patch_optimizer_state_dict(model, optimizers=optimizers)
    train(model, *optimizers)
    expected = whole((dict(model.state_dict()), optimizers[0].state_dict()))
    assert set(expected[0]) == set(build("plain").state_dict())
    # A trainer that knows only `state_dict()` saves canonical names: the model is a Stateful to the engine.
    dcp.save({"model": model, "optimizer": optimizers[0]}, checkpoint_id=folder)
    train(model, *optimizers)
    dcp.load({"model": model, "optimizer": optimizers[1]}, checkpoint_id=folder)
    assert_equal(whole((dict(model.state_dict()), optimizers[0].state_dict())), expected)

    plain = build("plain", seed=4)
    fresh = MAKERS["muon-and-sgd"](plain)
    _patch_optimizer_state_dict(plain, optimizers=fresh)
    dcp.load({"model": plain, "optimizer": fresh[0]}, checkpoint_id=folder)
    assert_equal(dict(plain.state_dict()), expected[0])
    assert_equal(fresh[1].state_dict(), expected[1])


def test_patched_models_and_optimizers_are_saved_and_loaded_as_they_are(tmp_path: Any) -> None:
    run_ranks(2, _patched, str(tmp_path / "c"))


def _averaged(folder: str) -> None:
    def average(model: nn.Module) -> AveragedModel:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    model = build("ddp-of-mixed-up")
    ema, optimizer = average(model), adamw(model)
    for _ in range(2):
        train(model, optimizer, steps=1)
        ema.update_parameters(model)
    state = get_model_state_dict(ema)
    assert set(state) == {"n_averaged", *(f"module.{name}" for name in get_model_state_dict(model))}
    dcp.save({"ema": state, "model": get_model_state_dict(model)}, checkpoint_id=folder)
    # fully_shard's modules cannot be copied: the average of a sharded model is sharded after it has been made.
    other = build("fsdp2", seed=4)
    sharded = AveragedModel(build("plain", seed=5), multi_avg_fn=get_ema_multi_avg_fn(0.5))
    sharded.module = build("fsdp2", seed=5)
    loaded: dict[str, Any] = {"ema": get_model_state_dict(sharded), "model": get_model_state_dict(other)}
    dcp.load(loaded, checkpoint_id=folder)
    assert set_model_state_dict(sharded, loaded["ema"]) == ([], [])
    assert set_model_state_dict(other, loaded["model"]) == ([], [])
    assert sharded.n_averaged == 2
    ema.update_parameters(model)
    sharded.update_parameters(other)
    assert_close(whole(dict(get_model_state_dict(sharded))), whole(dict(get_model_state_dict(ema))))


def test_an_average_of_the_model_moves_to_a_sharded_one(tmp_path: Any) -> None:
    run_ranks(2, _averaged, str(tmp_path / "c"))


def _does_not_match() -> None:
    model = build("fsdp2")
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.01)
    train(model, optimizer)
    before = whole(get_optimizer_state_dict(model, optimizer))
    state: Any = whole(get_optimizer_state_dict(model, optimizer))
    state["state"]["blocks.0.up.weight"]["exp_avg"] = torch.zeros(7, 7)
    state["state"]["model.norm.bias"] = state["state"].pop("norm.bias")
    params = state["param_groups"][1]["params"]
    params[params.index("norm.bias")] = "model.norm.bias"
    for broadcast in (False, True):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        with pytest.raises(RuntimeError) as caught:
            set_optimizer_state_dict(
                model, optimizer, state if dist.get_rank() == 0 or not broadcast else {}, options=options
            )
        assert "blocks.0.up.weight.exp_avg: found (7, 7), expected (7, 6)" in str(caught.value)
        assert '"norm.bias" (did you mean "model.norm.bias"?)' in str(caught.value)
        assert_equal(whole(get_optimizer_state_dict(model, optimizer)), before)
    # Rank 0's optimizer could take what rank 0 sends, rank 1's could not.
    sent: Any = whole(get_optimizer_state_dict(model, optimizer))
    del sent["state"]["norm.bias"]
    for group in sent["param_groups"]:
        group["params"] = [fqn for fqn in group["params"] if fqn != "norm.bias"]
    bias = dict(model.named_parameters())["norm.bias"]
    lesser = torch.optim.AdamW(
        [{**group, "params": [value for value in group["params"] if value is not bias]} for group in groups_of(model)]
    )
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    with pytest.raises(PlanError, match=r'parameter\(s\) "norm.bias"') as caught:
        set_optimizer_state_dict(model, *((lesser, sent) if dist.get_rank() == 0 else (optimizer, {})), options=options)
    assert ("[rank 1]" in str(caught.value)) == (dist.get_rank() == 0)
    assert not lesser.state
    assert_equal(whole(get_optimizer_state_dict(model, optimizer)), before)
    stranger = torch.optim.Adam([*model.parameters(), nn.Parameter(torch.zeros(2, 3))])
    with pytest.raises(PlanError, match=r"group 0 of Adam, of shape \(2, 3\).*made after the model has been"):
        set_optimizer_state_dict(model, stranger, state, options=FULL)


def test_what_does_not_match_is_told_on_every_rank_and_changes_nothing() -> None:
    run_ranks(2, _does_not_match)
