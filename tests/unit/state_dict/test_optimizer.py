"""Getting and setting optimizers' state on one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as stock
from torch import nn

from dcp_plugins.errors import PlanError
from dcp_plugins.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from tests.unit.state_dict.samples import (
    Net,
    TiedNet,
    assert_equal,
    groups_of,
    snapshot,
    train,
    with_frozen_first_layer,
)

Maker = Callable[[Any], torch.optim.Optimizer]

MAKERS: dict[str, Maker] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
}


class Nested(torch.optim.Optimizer):
    """In the style of third parties: nested, non-tensor and shared state, counters of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "name": "nested"})
        self.calls = 0
        self.log: list[int] = []
        self.generator = torch.Generator().manual_seed(3)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        self.log.append(self.calls)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, mode="warm", anchor=p.clone(), blocks={0: {"sum": torch.zeros_like(p)}}, h=[])
                state["step"] += 1
                state["blocks"][0]["sum"].add_(p.grad)
                state["h"] = [*state["h"], float(state["step"])][-2:]
                noise = torch.rand(p.shape, generator=self.generator) * 0 + torch.rand(p.shape) * 0
                p.sub_((state["blocks"][0]["sum"] + noise) * group["lr"])


MAKERS["nested"] = Nested


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_continues_exactly_after_a_move_to_another_model(name: str) -> None:
    model = Net()
    optimizer = MAKERS[name](groups_of(model) if name != "nested" else model.parameters())
    train(model, optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    other = Net()
    fresh = MAKERS[name](groups_of(other) if name != "nested" else other.parameters())
    saved = snapshot(optimizer_state)
    set_state_dict(other, fresh, model_state_dict=model_state, optim_state_dict=optimizer_state)
    assert_equal(optimizer_state, saved)
    assert_equal(fresh.state_dict(), optimizer.state_dict())
    train(model, optimizer)
    train(other, fresh)
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "nested"])
@pytest.mark.parametrize("flat", [False, True])
def test_state_equals_torchs_and_moves_both_ways(name: str, flat: bool) -> None:
    model = Net()
    optimizer = MAKERS[name](model.parameters())
    train(model, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    ours = get_optimizer_state_dict(model, optimizer, options=options)
    theirs = stock.get_optimizer_state_dict(
        model, optimizer, options=stock.StateDictOptions(flatten_optimizer_state_dict=flat)
    )
    assert_equal(ours, theirs)
    for setter, state in ((stock.set_optimizer_state_dict, ours), (set_optimizer_state_dict, theirs)):
        fresh = MAKERS[name](model.parameters())
        setter(model, fresh, snapshot(state), options=stock.StateDictOptions(flatten_optimizer_state_dict=flat))
        loaded = fresh.state_dict()
        # Torch leaves empty dicts for a stateless optimizer.
        loaded["state"] = {key: value for key, value in loaded["state"].items() if value}
        assert_equal(loaded, optimizer.state_dict())


def test_state_tensors_are_the_optimizers_memory_and_the_dicts_are_not() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    state: Any = get_optimizer_state_dict(model, optimizer)["state"]
    weight = model.last.weight
    assert state["last.weight"]["exp_avg"] is optimizer.state[weight]["exp_avg"]
    state["last.weight"].clear()
    assert optimizer.state[weight]


def test_two_optimizers_loaded_from_one_state_dict_share_nothing() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    state = get_optimizer_state_dict(model, optimizer)
    other = torch.optim.Adam(model.parameters())
    set_optimizer_state_dict(model, other, state)
    mine, theirs = other.state[model.last.weight], optimizer.state[model.last.weight]
    assert all(mine[key].data_ptr() != theirs[key].data_ptr() for key in mine)


def test_every_group_keeps_its_own_options_and_a_scheduler_its_extra_key() -> None:
    model = Net()
    optimizer = torch.optim.AdamW([*groups_of(model), {"params": [], "lr": 3.0}], lr=0.25)
    train(model, optimizer)
    state = get_optimizer_state_dict(model, optimizer)
    other = torch.optim.AdamW([*groups_of(model), {"params": []}], lr=9.0, weight_decay=7.0)
    for group in other.param_groups:
        group.pop("initial_lr", None)
    set_optimizer_state_dict(model, other, state)
    assert_equal(other.state_dict(), optimizer.state_dict())
    assert other.param_groups[0]["initial_lr"] == 0.5
    assert other.param_groups[2]["lr"] == 3.0


@pytest.mark.parametrize("flat", [False, True])
def test_reordered_groups_and_parameters_find_their_state_and_options(flat: bool) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(groups_of(model))
    train(model, optimizer)
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    groups = groups_of(model)[::-1]
    for group in groups:
        group["params"] = group["params"][::-1]
    other = torch.optim.AdamW(groups, lr=5.0)
    set_optimizer_state_dict(model, other, state)
    for parameter in model.parameters():
        assert_equal(other.state[parameter], optimizer.state[parameter])
    assert [group["weight_decay"] for group in other.param_groups] == [0.0, 0.1]
    assert other.param_groups[0]["lr"] == 0.002


def test_groups_split_since_the_save_are_refused_by_name_and_get_the_saved_options_if_not_strict() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
    train(model, optimizer)
    other = torch.optim.AdamW(groups_of(model), lr=5.0)
    state = get_optimizer_state_dict(model, optimizer)
    with pytest.raises(PlanError, match=r"Expected 2 parameter group\(s\).*Found 1: first.weight and \d more"):
        set_optimizer_state_dict(model, other, state)
    assert not other.state
    set_optimizer_state_dict(model, other, state, options=StateDictOptions(strict=False))
    assert [group["lr"] for group in other.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize("flat", [False, True])
def test_groups_merged_since_the_save_are_refused_if_their_options_differ(flat: bool) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(groups_of(model))
    train(model, optimizer)
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    other = torch.optim.AdamW(model.parameters())
    with pytest.raises(PlanError, match=r"group 0 of AdamW.*'weight_decay' \(0.1 for some, 0.0 for others\)"):
        set_optimizer_state_dict(model, other, state)
    assert not other.state
    set_optimizer_state_dict(model, other, state, options=StateDictOptions(strict=False))
    assert len(other.state) == len(list(model.parameters()))


def test_a_flat_state_dict_loads_into_nested_and_back() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(groups_of(model))
    train(model, optimizer)
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        state = get_optimizer_state_dict(model, optimizer, options=options)
        other = torch.optim.AdamW(groups_of(model), lr=5.0)
        set_optimizer_state_dict(model, other, state, options=StateDictOptions(flatten_optimizer_state_dict=not flat))
        assert_equal(other.state_dict(), optimizer.state_dict())


def test_nested_state_with_numbers_for_keys_survives_flattening() -> None:
    model = nn.Linear(5, 3)
    optimizer = Nested(model.parameters())
    train(model, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    assert "state.weight.blocks.0.sum" in state
    expected = snapshot(optimizer.state_dict())
    train(model, optimizer, 1)
    other = copy.copy(optimizer)
    set_optimizer_state_dict(model, optimizer, snapshot(state))
    set_optimizer_state_dict(model, other, snapshot(state))
    got = optimizer.state_dict()["state"][0]
    assert set(got["blocks"]) == {0}
    assert torch.equal(got["blocks"][0]["sum"], state["state.weight.blocks.0.sum"])
    assert got["mode"] == expected["state"][0]["mode"] == "warm"


def test_a_frozen_parameters_state_is_kept_where_torch_drops_it() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    with_frozen_first_layer(model)
    state = get_optimizer_state_dict(model, optimizer)
    fresh, stock_fresh = torch.optim.Adam(model.parameters()), torch.optim.Adam(model.parameters())
    set_optimizer_state_dict(model, fresh, state)
    assert_equal(fresh.state_dict(), optimizer.state_dict())
    stock.set_optimizer_state_dict(model, stock_fresh, snapshot(state))
    assert model.first.weight not in stock_fresh.state


def test_parameters_saved_without_state_load_without_state() -> None:
    model = Net()
    unused = nn.Linear(2, 2)
    both = nn.ModuleDict({"net": model, "unused": unused})
    optimizer = torch.optim.Adam(both.parameters())
    train(model, optimizer)
    state = get_optimizer_state_dict(both, optimizer)
    assert_equal(state, stock.get_optimizer_state_dict(both, optimizer))
    assert "unused.weight" not in state["state"]
    fresh = torch.optim.Adam(both.parameters())
    set_optimizer_state_dict(both, fresh, state)
    assert_equal(fresh.state_dict(), optimizer.state_dict())


def test_missing_state_is_refused_with_a_suggestion_unless_not_strict() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    state: Any = snapshot(get_optimizer_state_dict(model, optimizer))
    state["state"]["model.last.weight"] = state["state"].pop("last.weight")
    state["param_groups"][0]["params"].remove("last.weight")
    before = snapshot(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing optimizer state.*"last.weight" \(did you mean "model.last.weight'):
        set_optimizer_state_dict(model, optimizer, state)
    assert_equal(optimizer.state_dict(), before)
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(strict=False))
    assert_equal(optimizer.state_dict(), before)


def test_a_load_that_would_erase_state_is_refused_unless_not_strict() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    state: Any = get_optimizer_state_dict(model, optimizer)
    del state["state"]["last.weight"]
    with pytest.raises(RuntimeError, match="Missing optimizer state for parameter.*last.weight"):
        set_optimizer_state_dict(model, optimizer, state)
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(strict=False))
    assert optimizer.state[model.last.weight]


def test_step_may_be_a_number_or_a_tensor() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    expected = snapshot(optimizer.state_dict())
    state: Any = snapshot(get_optimizer_state_dict(model, optimizer))
    for one in state["state"].values():
        one["step"] = int(one["step"])
    for target in (torch.optim.Adam(model.parameters()), optimizer):
        set_optimizer_state_dict(model, target, state)
        assert_equal(target.state_dict(), expected)
    counting = Nested(model.parameters())
    train(model, counting)
    nested: Any = snapshot(get_optimizer_state_dict(model, counting))
    for one in nested["state"].values():
        one["step"] = torch.tensor(one["step"])
    set_optimizer_state_dict(model, counting, nested)
    assert type(counting.state[model.last.weight]["step"]) is int


def test_several_optimizers_over_one_model_make_one_state_dict() -> None:
    def optimizers_of(model: Net) -> list[torch.optim.Optimizer]:
        rest = [p for name, p in model.named_parameters() if not name.startswith("last")]
        return [torch.optim.Adam(model.last.parameters()), torch.optim.SGD(rest, lr=0.1, momentum=0.5)]

    model, other = Net(), Net()
    both, fresh = optimizers_of(model), optimizers_of(other)
    train(model, both)
    state = get_state_dict(model, both)
    assert_equal(state[1], stock.get_optimizer_state_dict(model, both))
    set_state_dict(other, iter(fresh), model_state_dict=state[0], optim_state_dict=state[1])
    for one, two in zip(both, fresh, strict=True):
        assert_equal(one.state_dict(), two.state_dict())
    with pytest.raises(PlanError, match="Two optimizers hold state"):
        get_optimizer_state_dict(model, [both[0], both[0]])


def test_an_optimizer_over_other_parameters_is_named_with_group_and_index() -> None:
    model = Net()
    optimizer = torch.optim.Adam([{"params": [model.last.weight]}, {"params": [model.first.bias, torch.ones(2, 3)]}])
    for act in (
        lambda: get_optimizer_state_dict(model, optimizer),
        lambda: set_optimizer_state_dict(model, [optimizer], {}),
    ):
        with pytest.raises(PlanError, match=r"parameter 1 of group 1 of Adam, of shape \(2, 3\)"):
            act()


def test_tied_parameters_have_one_entry_and_load_from_either_name() -> None:
    model = TiedNet()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    state: Any = get_optimizer_state_dict(model, optimizer)
    assert_equal(state, stock.get_optimizer_state_dict(model, optimizer))
    assert "head.weight" not in state["state"]
    state["state"]["head.weight"] = state["state"].pop("embed.weight")
    params = state["param_groups"][0]["params"]
    params[params.index("embed.weight")] = "head.weight"
    fresh = torch.optim.Adam(model.parameters())
    set_optimizer_state_dict(model, fresh, state)
    assert_equal(fresh.state_dict(), optimizer.state_dict())


def test_an_optimizers_own_numbered_state_dict_loads() -> None:
    model = Net()
    optimizer = torch.optim.Adam(groups_of(model))
    train(model, optimizer)
    fresh = torch.optim.Adam(groups_of(model))
    set_optimizer_state_dict(model, fresh, optimizer.state_dict())
    assert_equal(fresh.state_dict(), optimizer.state_dict())
    with pytest.raises(PlanError, match="keyed by parameter names, found numbers"):
        set_optimizer_state_dict(model, torch.optim.Adam([model.last.weight]), optimizer.state_dict())


@pytest.mark.parametrize("live", [False, True])
def test_a_size_mismatch_of_state_names_both_sizes(live: bool) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    state: Any = snapshot(get_optimizer_state_dict(model, optimizer))
    state["state"]["last.weight"]["exp_avg"] = torch.zeros(3, 9)
    target = optimizer if live else torch.optim.Adam(model.parameters())
    with pytest.raises(RuntimeError, match=r"last.weight.exp_avg: found \(3, 9\), expected \(3, 8\)"):
        set_optimizer_state_dict(model, target, state)


def test_optimizer_state_for_parameters_on_meta_is_refused() -> None:
    with torch.device("meta"):
        model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(PlanError, match=r"meta device.*Load the model first"):
        set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))


def test_something_else_than_an_optimizer_state_dict_is_refused() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(PlanError, match=r"Expected an optimizer state dict.*last.weight"):
        set_optimizer_state_dict(model, optimizer, dict(model.state_dict()))
    with pytest.raises(TypeError, match="found Linear"):
        get_optimizer_state_dict(model, [model.last])  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="at least one optimizer"):
        get_optimizer_state_dict(model, [])


def test_set_state_dict_leaves_the_model_alone_without_model_state() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    before = snapshot(dict(model.state_dict()))
    state = snapshot(get_optimizer_state_dict(model, optimizer))
    assert set_state_dict(model, optimizer, model_state_dict={}, optim_state_dict=state) == ([], [])
    assert_equal(dict(model.state_dict()), before)
    model_state, nothing = get_state_dict(model, [])
    assert nothing == {}
    assert set_state_dict(model, [], model_state_dict=model_state, optim_state_dict={}) == ([], [])


@pytest.mark.parametrize("broadcast", [False, True])
def test_full_options_work_on_one_process(broadcast: bool) -> None:
    model = Net()
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    fresh = torch.optim.Adafactor(model.parameters())
    set_optimizer_state_dict(model, fresh, state, options=options)
    assert_equal(fresh.state_dict(), optimizer.state_dict())


def test_patched_methods_speak_canonical_names_and_do_not_recurse() -> None:
    from dcp_plugins.state_dict import _patch_model_state_dict, _patch_optimizer_state_dict

    model = nn.DataParallel(Net())
    optimizer = torch.optim.Adam(model.parameters())
    _patch_model_state_dict(model)
    _patch_optimizer_state_dict(model, optimizers=(optimizer,))
    assert "last.weight" in model.state_dict()
    train(model.module, optimizer)
    state = snapshot(optimizer.state_dict())
    assert "last.weight" in state["state"]
    train(model.module, optimizer)
    optimizer.load_state_dict(state)
    model.load_state_dict(model.state_dict())
    assert_equal(optimizer.state_dict(), state)


@pytest.mark.parametrize("flat", [False, True])
def test_a_state_dict_that_lost_the_state_of_one_parameter_is_refused_also_for_a_fresh_optimizer(flat: bool) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state: Any = get_optimizer_state_dict(model, optimizer, options=options)
    if flat:
        for key in [key for key in state if key.startswith("state.last.weight.")]:
            del state[key]
    else:
        del state["state"]["last.weight"]
    fresh = torch.optim.Adam(model.parameters())
    with pytest.raises(PlanError, match="Missing optimizer state for parameter.*last.weight"):
        set_optimizer_state_dict(model, fresh, state)
    assert not fresh.state


def test_a_parameter_without_state_is_no_loss_where_it_had_none_when_the_state_dict_was_made() -> None:
    model = with_frozen_first_layer(Net())
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    state: Any = get_optimizer_state_dict(model, optimizer)
    model.requires_grad_(True)
    fresh = torch.optim.Adam(model.parameters())
    set_optimizer_state_dict(model, fresh, state)
    assert len(fresh.state) == len(optimizer.state)


def test_a_state_dict_that_does_not_tell_what_had_state_is_loaded_with_a_warning() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    own: Any = get_optimizer_state_dict(model, optimizer)
    state = {"state": dict(own["state"]), "param_groups": own["param_groups"]}
    del state["state"]["last.weight"]
    fresh = torch.optim.Adam(model.parameters())
    with pytest.warns(UserWarning, match=r"no state for last\.weight, and does not say whether there was any"):
        set_optimizer_state_dict(model, fresh, state)
    assert len(fresh.state) == len(optimizer.state) - 1


def test_a_flat_state_dict_with_dots_in_keys_of_nested_dicts_is_refused_where_they_collide() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    first, second = {"state.weight.m.0": torch.zeros(2)}, {"state.weight.m.0.5": torch.ones(2)}
    for entries in ({**first, **second}, {**second, **first}):
        with pytest.raises(PlanError, match="state.weight.m.0.* cannot be told from another one"):
            set_optimizer_state_dict(model, optimizer, {**state, **entries})
    assert not optimizer.state
