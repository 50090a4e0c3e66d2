"""A fault on one rank is an error on every rank that would wait for it; and ranks that lack something get it whole.

Collectives time out after seconds here: a rank that waits for one which has failed is an error soon.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

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
SENT = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
CPU = torch.device("cpu")


def on_two_ranks(function: Callable[..., None], *args: Any) -> None:
    run_ranks(2, function, *args, timeout_seconds=40, collective_timeout_seconds=6)


def fails_everywhere(act: Callable[[], Any], words: str) -> None:
    """Expect the failing rank's words on every rank, and that no rank leaves before all have raised."""
    with pytest.raises(Exception, match=words) as caught:
        act()
    assert "imed out" not in str(caught.value)
    dist.barrier()


def agreements(act: Callable[[], Any]) -> int:
    """Count the times at which this rank talks to others to agree with them, or sends whole tensors."""
    seen: list[str] = []
    names = {"all_reduce", "broadcast", "all_gather_object", "broadcast_object_list", "all_gather", "barrier"}
    real = {name: getattr(dist, name) for name in names}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return real[name](*args, **kwargs)

        return call

    try:
        for name in names:
            setattr(dist, name, counted(name))
        act()
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
    return len(seen)


def fsdp1(*, orig: bool = True) -> FullyShardedDataParallel:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 40))
    return FullyShardedDataParallel(layers, device_id=CPU, use_orig_params=orig)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    model(torch.ones(2, 4)).pow(2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


class Remembering(torch.optim.Optimizer):
    """State in containers, and numbers beside them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["calls"] = state.get("calls", 0) + 1
                state["history"] = [parameter.grad.clone(), parameter.grad * 2]
                state["pair"] = ({"mean": parameter.grad * 3, "age": 7}, parameter.grad * 4)


def _containers() -> None:
    sharded = fsdp1()
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 40))
    plain.load_state_dict(dict(get_model_state_dict(sharded, options=FULL)))
    found: Any = get_optimizer_state_dict(sharded, stepped(sharded, Remembering(sharded.parameters())), options=FULL)
    expected: Any = get_optimizer_state_dict(plain, stepped(plain, Remembering(plain.parameters())))
    assert set(found["state"]) == set(expected["state"])
    for fqn, state in expected["state"].items():
        assert_equal(found["state"][fqn], state)
        assert type(found["state"][fqn]["history"]) is list
        assert type(found["state"][fqn]["pair"]) is tuple


def test_a_rank_that_holds_nothing_of_a_parameter_gets_its_lists_and_tuples_as_they_are() -> None:
    on_two_ranks(_containers)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.third = nn.Linear(4, 4, bias=False)
        self.second.weight = self.third.weight = self.first.weight
        self._register_state_dict_hook(self._differ)

    @staticmethod
    def _differ(_: nn.Module, state_dict: dict[str, Any], prefix: str, __: Any) -> None:
        state_dict[f"{prefix}second.weight"] = state_dict[f"{prefix}second.weight"] * 2


def _tied(shard: bool) -> None:
    model = Tied()
    dist.broadcast(model.first.weight.data, 0)
    weight = model.first.weight.detach().clone()
    if shard:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    state: Any = get_model_state_dict(model, options=FULL)
    assert_equal(dict(state), {"first.weight": weight, "second.weight": weight * 2, "third.weight": weight})
    assert state["first.weight"].data_ptr() == state["third.weight"].data_ptr()


@pytest.mark.parametrize("shard", [False, True])
def test_tied_parameters_that_a_hook_made_different_stay_different(shard: bool) -> None:
    on_two_ranks(_tied, shard)


def _state_on_one_rank() -> None:
    model = fsdp1()
    first = [parameter for name, parameter in model.named_parameters() if name.endswith("0.weight")]
    optimizer = stepped(model, torch.optim.AdamW(first))
    state: Any = get_optimizer_state_dict(model, optimizer, options=FULL)
    assert list(state["state"]) == ["0.weight"]
    assert state["state"]["0.weight"]["exp_avg"].shape == (4, 4)
    assert state["state"]["0.weight"]["step"] == 1
    # It was one rank's alone.
    assert bool(first[0].numel()) == (dist.get_rank() == 0)


def test_optimizer_state_of_which_one_rank_has_none_is_whole_on_both() -> None:
    on_two_ranks(_state_on_one_rank)


class Silent(torch.optim.AdamW):
    def state_dict(self) -> Any:
        if dist.get_rank() == 1:
            raise ValueError("no state on rank 1")
        return super().state_dict()


def _getters() -> None:
    model = fsdp1()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    silent = Silent(model.parameters())
    fails_everywhere(lambda: get_optimizer_state_dict(model, silent, options=FULL), "no state on rank 1")
    optimizers: Any = optimizer if dist.get_rank() == 0 else [optimizer, "text"]
    fails_everywhere(lambda: get_optimizer_state_dict(model, optimizers, options=FULL), "found str at place 1")
    fails_everywhere(lambda: get_state_dict(model, optimizers, options=FULL), "found str at place 1")
    context = FullyShardedDataParallel.summon_full_params(model, writeback=False)
    with context:
        if dist.get_rank() == 1:
            fails_everywhere(lambda: get_model_state_dict(model, options=FULL), "summon_full_params")
    if dist.get_rank() == 0:
        fails_everywhere(lambda: get_model_state_dict(model, options=FULL), "summon_full_params")
    assert set(get_model_state_dict(model, options=FULL)) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_getter_of_whole_tensors_that_cannot_begin_on_one_rank_fails_on_both() -> None:
    on_two_ranks(_getters)


def fsdp2() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model


def columns(value: Any) -> DTensor:
    """The same tensor, laid out so that filling one by rows from it communicates."""
    assert isinstance(value, DTensor)
    return value.redistribute(placements=[Shard(1)])


def _resharded() -> None:
    model = fsdp2()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    rank = dist.get_rank()

    def model_state() -> dict[str, Any]:
        state = dict(get_model_state_dict(model))
        state["0.weight"] = columns(state["0.weight"]) * 2
        return state

    def optimizer_state() -> Any:
        state: Any = get_optimizer_state_dict(model, optimizer)
        state["state"]["0.weight"]["exp_avg"] = columns(state["state"]["0.weight"]["exp_avg"]) * 2
        return state

    whole: Any = get_model_state_dict(model, options=FULL)
    before = {key: value.clone() for key, value in whole.items()}
    wrong = model_state()
    if rank == 1:
        wrong["1.running_mean"] = torch.zeros(5)
    fails_everywhere(lambda: set_model_state_dict(model, wrong), "size mismatch for 1.running_mean")
    lacking = optimizer_state()
    if rank == 1:
        del lacking["state"]["0.bias"]
    fails_everywhere(lambda: set_optimizer_state_dict(model, optimizer, lacking), "Missing optimizer state for.*0.bias")
    broken = optimizer_state()
    if rank == 1:
        broken["param_groups"] = 3
    fails_everywhere(lambda: set_optimizer_state_dict(model, optimizer, broken), "param_groups|int|iterable")
    fails_everywhere(
        lambda: set_state_dict(
            model,
            optimizer,
            model_state_dict={**get_model_state_dict(model), **({"1.running_mean": torch.zeros(5)} if rank else {})},
            optim_state_dict=optimizer_state(),
        ),
        "size mismatch for 1.running_mean",
    )
    assert_equal(dict(get_model_state_dict(model, options=FULL)), before)
    moments: Any = get_optimizer_state_dict(model, optimizer, options=FULL)
    moment = moments["state"]["0.weight"]["exp_avg"].clone()
    set_state_dict(model, optimizer, model_state_dict=model_state(), optim_state_dict=optimizer_state())
    after: Any = get_optimizer_state_dict(model, optimizer, options=FULL)["state"]
    assert_equal(after["0.weight"]["exp_avg"], moment * 2)
    assert_equal(get_model_state_dict(model, options=FULL)["0.weight"], before["0.weight"] * 2)


def test_what_does_not_fit_on_one_rank_stops_every_rank_where_values_are_sharded_otherwise() -> None:
    on_two_ranks(_resharded)


def _quiet() -> None:
    model = fsdp2()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    own: Any = get_model_state_dict(model)
    states = {key: value.clone() for key, value in own.items()}
    optim = get_optimizer_state_dict(model, optimizer)

    def act() -> None:
        set_state_dict(model, optimizer, model_state_dict=states, optim_state_dict=optim)
        set_model_state_dict(model, states)
        set_optimizer_state_dict(model, optimizer, optim)

    assert agreements(act) == 0
    states["0.weight"] = columns(states["0.weight"])
    assert agreements(act) > 0
    states["0.weight"] = states["0.weight"].redistribute(placements=[Replicate()])
    set_model_state_dict(model, states)


def test_setting_what_is_laid_out_alike_communicates_nothing() -> None:
    on_two_ranks(_quiet)


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"call": (lambda: 1) if dist.get_rank() == 0 else None}

    def set_extra_state(self, state: Any) -> None:
        """Take anything."""


class Unloadable(nn.Linear):
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if dist.get_rank() == 1:
            raise OSError("rank 1 cannot load")
        super()._load_from_state_dict(*args, **kwargs)


def _sending() -> None:
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = nn.Linear(4, 4)
    own = stepped(model, torch.optim.SGD(model.parameters(), momentum=0.9))
    other = torch.optim.SGD(nn.Linear(4, 4).parameters(), momentum=0.9)
    state: Any = get_optimizer_state_dict(model, own) if rank == 0 else {}
    optimizer = own if rank == 0 else other
    words = "found 2 that are not"
    fails_everywhere(lambda: set_optimizer_state_dict(model, optimizer, state, options=SENT), words)
    theirs: Any = own if rank == 0 else []
    fails_everywhere(lambda: set_optimizer_state_dict(model, theirs, state, options=SENT), "at least one optimizer")
    models: Any = model if rank == 0 else [model, 3]
    fails_everywhere(lambda: set_model_state_dict(models, {}, options=SENT), "parts of one, found int")
    with torch.device("meta"):
        unmade = nn.Linear(4, 4)
    target = (model, own) if rank == 0 else (unmade, torch.optim.SGD(unmade.parameters(), momentum=0.9))
    fails_everywhere(lambda: set_optimizer_state_dict(*target, state, options=SENT), "on the meta device")
    extra = Extra(4, 4)
    fails_everywhere(lambda: set_model_state_dict(extra, extra.state_dict(), options=SENT), "ickle")
    unloadable = Unloadable(4, 4)
    loaded = dict(unloadable.state_dict())
    stuck = stepped(unloadable, torch.optim.SGD(unloadable.parameters(), momentum=0.9))
    both = get_optimizer_state_dict(unloadable, stuck)
    fails_everywhere(
        lambda: set_state_dict(unloadable, stuck, model_state_dict=loaded, optim_state_dict=both, options=SENT),
        "rank 1 cannot load",
    )
    set_optimizer_state_dict(model, own, state, options=SENT)


def test_a_rank_that_cannot_take_what_rank_0_sends_stops_every_rank() -> None:
    on_two_ranks(_sending)


def _unpackable() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: torch.full_like(value, 5.0) for key, value in before.items()}
    # Rank 0 can tell of it, and cannot copy it into what it sends.
    state["1.weight"] = state["1.weight"].to_sparse()
    fails_everywhere(lambda: set_model_state_dict(model, state, options=SENT), "parse")
    if dist.get_rank() == 1:
        assert_equal(dict(model.state_dict()), before)


def test_what_rank_0_cannot_pack_fills_nobody() -> None:
    on_two_ranks(_unpackable)
