"""Optimizers whose state is out of the ordinary, through the engine and back."""

from __future__ import annotations

import copy
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import dcp_plugins as dcp
from dcp_plugins.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from tests.unit.state_dict.samples import Net, assert_equal, groups_of, snapshot, train
from tests.unit.state_dict.test_optimizer import MAKERS, Maker

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MORE: dict[str, Maker] = {
    "adam-maximize": lambda p: torch.optim.Adam(p, lr=0.01, maximize=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop-centered": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, fused=True),
    "tensor-lr-and-betas": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor([0.01]), betas=(torch.tensor(0.8), torch.tensor(0.9)), foreach=False
    ),
}


@pytest.mark.parametrize("name", [*MAKERS, *MORE])
@pytest.mark.parametrize("flat", [False, True])
def test_a_run_continues_exactly_from_a_checkpoint(tmp_path: Any, name: str, flat: bool) -> None:
    make = {**MAKERS, **MORE}[name]
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    runs = []
    for _ in range(2):
        model = Net()
        runs.append((model, make(groups_of(model) if name != "nested" else model.parameters())))
    (model, optimizer), (other, fresh) = runs
    scheduler, other_scheduler = (torch.optim.lr_scheduler.StepLR(one, 1, gamma=0.5) for one in (optimizer, fresh))
    train(model, optimizer)
    scheduler.step()
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state, "scheduler": scheduler}
    dcp.save(state, checkpoint_id=tmp_path / "c")
    model_state, optimizer_state = get_state_dict(other, fresh, options=options)
    state = {"model": model_state, "optimizer": optimizer_state, "scheduler": other_scheduler}
    dcp.load(state, checkpoint_id=tmp_path / "c")
    set_state_dict(other, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert_equal(fresh.state_dict(), optimizer.state_dict())
    for one, two, schedule in ((model, optimizer, scheduler), (other, fresh, other_scheduler)):
        train(one, two, steps=1)
        schedule.step()
        train(one, two, steps=1)
    assert_equal(dict(get_model_state_dict(other)), dict(get_model_state_dict(model)))
    assert_equal(fresh.state_dict(), optimizer.state_dict())


def _loss(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(torch.linspace(-1, 1, 30).view(6, 5)).square().mean()
    loss.backward()
    return loss


@pytest.mark.parametrize("flat", [False, True])
def test_lbfgs_whose_history_grows_continues(tmp_path: Any, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def begun(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(steps)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3, history_size=5)
        for _ in range(steps):
            optimizer.step(lambda: _loss(model, optimizer))  # type: ignore[arg-type]
        return model, optimizer

    model, optimizer = begun(3)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path / "c")
    for steps in (0, 1):
        other, fresh = begun(steps)
        # The lists of a fresh one are empty, and those of the other shorter than the saved ones.
        own_model_state, own_state = get_state_dict(other, fresh, options=options)
        state: dict[str, Any] = {"model": own_model_state, "optimizer": own_state}
        dcp.load(state, checkpoint_id=tmp_path / "c")
        set_state_dict(other, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        assert_equal(fresh.state_dict(), optimizer.state_dict())
        reference, expected = begun(3)
        for one, two in ((reference, expected), (other, fresh)):
            two.step(lambda one=one, two=two: _loss(one, two))  # type: ignore[misc]
        assert_equal(dict(other.state_dict()), dict(reference.state_dict()))


def test_muon_and_adamw_share_a_model(tmp_path: Any) -> None:
    def made() -> tuple[Net, list[torch.optim.Optimizer]]:
        model = Net()
        weights, others = (group["params"] for group in groups_of(model))
        return model, [torch.optim.Muon(weights, lr=0.02), torch.optim.AdamW(others, lr=0.01)]

    model, optimizers = made()
    train(model, optimizers)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizers), strict=True))
    dcp.save(state, checkpoint_id=tmp_path / "c")
    other, fresh = made()
    state = dict(zip(("model", "optimizer"), get_state_dict(other, fresh), strict=True))
    dcp.load(state, checkpoint_id=tmp_path / "c")
    set_state_dict(other, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, optimizers)
    train(other, fresh)
    assert_equal(dict(get_model_state_dict(other)), dict(get_model_state_dict(model)))
    for one, two in zip(optimizers, fresh, strict=True):
        assert_equal(two.state_dict(), one.state_dict())


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_names_that_an_optimizer_was_given_stay_its_own(tmp_path: Any, wrap: Any, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = wrap(Net())
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.02)
    train(model, optimizer)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path / "c")
    other = Net()
    for named in (True, False):
        fresh = torch.optim.AdamW(other.named_parameters() if named else other.parameters(), lr=9.0)
        state: dict[str, Any] = {"optimizer": get_optimizer_state_dict(other, fresh, options=options)}
        dcp.load(state, checkpoint_id=tmp_path / "c")
        set_optimizer_state_dict(other, fresh, state["optimizer"])
        assert_equal(fresh.state_dict()["state"], optimizer.state_dict()["state"])
        assert fresh.param_groups[0]["lr"] == 0.02
        expected = [name for name, _ in other.named_parameters()] if named else None
        assert fresh.param_groups[0].get("param_names") == expected


class _Precise(torch.optim.Optimizer):
    """Keeps float32 for bfloat16 parameters, a mask, a counter, text in nested places and a queue."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(
                        master=p.float(),
                        mask=torch.zeros(p.shape, dtype=torch.bool),
                        hits=torch.zeros(2, dtype=torch.int64),
                        notes={"phase": "warm", "log": ["begun"]},
                        queue=deque([0], maxlen=3),
                    )
                state["mask"] |= p.grad > 0
                state["hits"] += 2**40 + 1
                state["notes"] = {"phase": "hot", "log": [*state["notes"]["log"], "stepped"]}
                state["queue"].append(int(state["hits"][0]))
                state["master"] -= p.grad.float() * group["lr"] * state["mask"]
                p.copy_(state["master"])


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("how", ["sharded", "full", "broadcast", "checkpoint"])
def test_state_keeps_its_own_types_where_torch_casts_it(tmp_path: Any, how: str, flat: bool) -> None:
    options = StateDictOptions(
        full_state_dict=how in ("full", "broadcast"),
        broadcast_from_rank0=how == "broadcast",
        flatten_optimizer_state_dict=flat,
    )

    def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Linear(4, 3).bfloat16()
        optimizer = _Precise(model.parameters())
        for _ in range(2):
            model(torch.linspace(-1, 1, 8).view(2, 4).bfloat16()).square().mean().backward()
            optimizer.step()
        return model, optimizer

    model, optimizer = stepped()
    state = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path / "c")
    live, empty = stepped()[1], _Precise(model.parameters())
    for fresh in (empty, live):
        other = model if fresh is empty else nn.Module()
        if fresh is live:
            other.weight, other.bias = fresh.param_groups[0]["params"]
        if how == "checkpoint":
            loaded: dict[str, Any] = {"optimizer": get_optimizer_state_dict(other, fresh, options=options)}
            # A queue is a class of its own, which weights-only loading cannot rebuild.
            trusting = dcp.DefaultLoadPlanner(weights_only=False)
            dcp.load(loaded, checkpoint_id=tmp_path / "c", planner=trusting)
            set_optimizer_state_dict(other, fresh, loaded["optimizer"], options=options)
        else:
            set_optimizer_state_dict(other, fresh, state, options=options)
        assert_equal(fresh.state_dict(), optimizer.state_dict())
        for mine, theirs in zip(fresh.state.values(), optimizer.state.values(), strict=True):
            assert mine["queue"] is not theirs["queue"]
            assert mine["queue"].maxlen == 3
    theirs = torch.optim.Optimizer.load_state_dict
    theirs(empty, optimizer.state_dict())
    assert empty.state[model.weight]["master"].dtype == torch.bfloat16
    assert empty.state[model.weight]["notes"]["phase"] != "hot"


class _Keeping(torch.optim.SGD):
    """Keeps state that belongs to no parameter, as some wrappers of optimizers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.5)
        self.state["global"] = {"count": 0, "norms": torch.zeros(3)}  # type: ignore[index]

    def step(self, closure: Any = None) -> Any:
        self.state["global"]["count"] += 1  # type: ignore[index]
        self.state["global"]["norms"] += 1  # type: ignore[index]
        return super().step(closure)


@pytest.mark.parametrize("broadcast", [False, True])
def test_state_that_belongs_to_no_parameter_is_kept(broadcast: bool) -> None:
    options = StateDictOptions(full_state_dict=broadcast, broadcast_from_rank0=broadcast)
    model = Net()
    optimizer, fresh = _Keeping(model.parameters()), _Keeping(model.parameters())
    train(model, optimizer)
    set_optimizer_state_dict(model, fresh, get_optimizer_state_dict(model, optimizer, options=options), options=options)
    assert fresh.state["global"]["count"] == 3  # type: ignore[index]
    assert torch.equal(fresh.state["global"]["norms"], torch.full((3,), 3.0))  # type: ignore[index]
    assert_equal(fresh.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("flat", [False, True])
def test_missing_state_suggests_only_names_that_are_nobodys(flat: bool) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    optimizer = torch.optim.Adam(model.parameters())
    model["b"](model["a"](torch.ones(1, 2))).sum().backward()
    optimizer.step()
    outer = nn.ModuleDict({"net": model})
    state: Any = get_optimizer_state_dict(outer, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    before = snapshot(optimizer.state_dict())
    with pytest.raises(RuntimeError) as caught:
        set_optimizer_state_dict(model, optimizer, state)
    for name in ("a.weight", "a.bias", "b.weight", "b.bias"):
        assert f'"{name}" (did you mean "net.{name}"?)' in str(caught.value)
    assert_equal(optimizer.state_dict(), before)
    short = snapshot(get_optimizer_state_dict(model, optimizer))
    del short["state"]["a.weight"]
    short["param_groups"][0]["params"].remove("a.weight")
    with pytest.raises(RuntimeError, match=r'parameter\(s\) "a.weight": in no parameter group'):
        set_optimizer_state_dict(model, optimizer, short)


class _Busy(torch.optim.Optimizer):
    """Keeps books of its own in a queue, an object and a module, which its step changes."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.losses: deque[float] = deque()
        self.book = SimpleNamespace(steps=0)
        self.average = nn.Linear(2, 2)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.losses.append(1.0)
        self.book.steps += 1
        self.average.weight.mul_(0.5)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("momentum", torch.zeros_like(p)).add_(p.grad)


def test_asking_for_initial_state_leaves_the_optimizers_own_books_alone() -> None:
    model = nn.Linear(3, 2)
    optimizer = _Busy(model.parameters())
    average = optimizer.average.weight.detach().clone()
    state = get_optimizer_state_dict(model, optimizer)
    assert sorted(state["state"]) == ["bias", "weight"]
    assert len(optimizer.losses) == 0
    assert optimizer.book.steps == 0
    assert torch.equal(optimizer.average.weight, average)


def test_what_an_optimizers_load_hooks_change_stays_changed() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = nn.Linear(3, 2)
    fresh = torch.optim.AdamW(other.parameters())

    def before(_: Any, given: Any) -> None:
        for number in given["state"]:
            given["state"][number] = {**given["state"][number], "tag": "hooked"}

    def after(loaded: Any) -> None:
        for own in loaded.state.values():
            own["exp_avg_sq"] = own["exp_avg_sq"].bfloat16() * 3

    fresh.register_load_state_dict_pre_hook(before)
    fresh.register_load_state_dict_post_hook(after)
    set_optimizer_state_dict(other, fresh, state)
    own = fresh.state[other.weight]
    assert own["tag"] == "hooked"
    assert torch.equal(own["exp_avg_sq"], state["state"]["weight"]["exp_avg_sq"].bfloat16() * 3)
    assert torch.equal(own["exp_avg"], state["state"]["weight"]["exp_avg"])
    assert len(fresh._optimizer_load_state_dict_pre_hooks) == 1


def test_a_number_keeps_its_type_when_a_tensor_was_saved() -> None:
    model = nn.Linear(3, 2)
    optimizer = _Busy(model.parameters())
    for p in model.parameters():
        optimizer.state[p].update(count=2, seen=True)
    state = get_optimizer_state_dict(model, optimizer)
    for each in state["state"].values():
        each.update(count=torch.tensor(5.0), seen=torch.tensor(0.0))
    set_optimizer_state_dict(model, optimizer, state)
    found = optimizer.state[model.weight]
    assert (type(found["count"]), found["count"], found["seen"]) == (int, 5, False)
