"""A restore is driven by what was saved: all of it comes back, or an error names what has no place."""

from __future__ import annotations

import datetime
import logging
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcp_plugins import events
from dcp_plugins.errors import CheckpointException
from dcp_plugins.manager import CheckpointManager, ModelState, OptimizerState, run_state
from dcp_plugins.state_dict import StateDictOptions


def saved(folder: Path, state: dict[str, Any]) -> None:
    with CheckpointManager(folder) as manager:
        assert manager.save(1, state, force=True)


def restored(folder: Path, state: dict[str, Any]) -> None:
    with CheckpointManager(folder) as manager:
        assert manager.restore(state) == 1


class Holder:
    """An object that keeps whatever it is given."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


VALUES: list[Any] = [
    {"a": 1, "b": {"c": [1, {"d": torch.arange(3)}]}},
    {},
    {"history": [{"loss": 1.0}, {"loss": 0.5}]},
    {"tensors": [torch.ones(1), torch.zeros(2)]},
    {0: 1, None: 2, (1, "x"): {True: 3}},
    {"counts": Counter({2: 1}), "ordered": OrderedDict(b=1, a=2), "default": defaultdict(list, a=[1])},
    {"queue": deque([1, 2], maxlen=3), "set": frozenset({1}), "nothing": None, "tuple": (1, (2,))},
    {"grown": torch.arange(5)},
    {"one": {"two": {"three": {}}}},
    {"first": {}, datetime.date(2020, 1, 1): {"empty": {}, "last": 1}, frozenset({"s"}): torch.ones(1)},
]

FRESH: list[Any] = [
    {},
    {"a": 0, "extra": 3},
    {"history": []},
    {"history": [{"loss": 0.0}] * 5, "tensors": None},
    {"grown": torch.zeros(0, dtype=torch.int64)},
    {"grown": None, "one": 1, "counts": {}, "queue": {"x": torch.ones(3)}},
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: ",".join(map(str, value)) or "empty")
@pytest.mark.parametrize("fresh", FRESH, ids=lambda value: ",".join(map(str, value)) or "empty")
def test_an_object_gets_the_state_that_it_was_saved_with(tmp_path: Path, value: Any, fresh: Any) -> None:
    saved(tmp_path, {"thing": Holder(value), "w": torch.ones(1)})
    holder = Holder(fresh)
    restored(tmp_path, {"thing": holder, "w": torch.zeros(1)})
    assert repr(holder.state) == repr(value)


def test_counters_keep_their_identity_and_that_of_the_containers_in_them(tmp_path: Path) -> None:
    counters: dict[str, Any] = {"step": 3, "seen": {0: 5, 1: 6}, "losses": [1.0, 2.0], "new": {"x": 1}}
    saved(tmp_path, run_state(model=nn.Linear(1, 1), counters=counters))
    seen: dict[Any, Any] = {0: 0}
    losses: list[float] = []
    fresh: dict[str, Any] = {"step": 0, "seen": seen, "losses": losses}
    restored(tmp_path, run_state(model=nn.Linear(1, 1), counters=fresh))
    assert fresh == counters
    assert fresh["seen"] is seen


def test_entries_that_were_not_saved_go_with_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, {"counters": {"seen": {0: 5}}})
    fresh = {"counters": {"seen": {0: 0, 1: 7}, "later": 1}}
    with caplog.at_level(logging.WARNING, logger="dcp_plugins"):
        restored(tmp_path, fresh)
    assert fresh == {"counters": {"seen": {0: 5}}}
    (record,) = [one for one in caplog.records if "removed entries" in one.getMessage()]
    assert "counters.later, counters.seen.1" in record.getMessage()


def test_a_tensor_of_a_plain_container_that_was_not_saved_is_an_error_that_names_it(tmp_path: Path) -> None:
    saved(tmp_path, {"weights": {"a": torch.ones(2)}})
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint.*weights\.b"):
        restored(tmp_path, {"weights": {"a": torch.zeros(2), "b": torch.zeros(2)}})


def test_a_tensor_of_a_plain_container_of_another_size_is_an_error_that_names_it(tmp_path: Path) -> None:
    saved(tmp_path, {"weights": {"a": torch.ones(2)}})
    with pytest.raises(
        CheckpointException, match=r"Size mismatch between saved \(2,\) and current: \(3,\) for weights"
    ):
        restored(tmp_path, {"weights": {"a": torch.zeros(3)}})


def test_a_part_that_was_not_saved_is_an_error_that_names_it(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    saved(tmp_path, run_state(model=model))
    with pytest.raises(CheckpointException, match="Missing key in checkpoint.*scaler.*The checkpoint holds"):
        restored(tmp_path, run_state(model=model, scaler=Holder({})))


def test_root_keys_that_a_state_leaves_out_are_named_in_one_line_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, {"model": {"w": torch.ones(2)}, "schedulers": [1], "extra": {"a": 2}})
    state = {"model": {"w": torch.zeros(2)}}
    with caplog.at_level(logging.INFO, logger="dcp_plugins"):
        restored(tmp_path, state)
    assert torch.equal(state["model"]["w"], torch.ones(2))
    (line,) = [record.getMessage() for record in caplog.records if "root keys" in record.getMessage()]
    assert "extra, schedulers" in line


def test_more_schedulers_than_the_run_has_are_an_error_that_names_them(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    saved(tmp_path, run_state(model=model, schedulers=[Holder({"a": 1}), Holder({"a": 2})]))
    with pytest.raises(CheckpointException, match="under 'schedulers'.*no object for: 1"):
        restored(tmp_path, run_state(model=model, schedulers=[Holder({"a": 0})]))


def test_models_whose_keys_differ_are_refused_before_anything_changes(tmp_path: Path) -> None:
    saved(tmp_path, run_state(model=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        CheckpointException, match=r"Missing key\(s\): 2\.bias, 2\.weight\. Unexpected key\(s\): 1\.bias, 1\.weight"
    ):
        restored(tmp_path, {"model": ModelState(model)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    restored(tmp_path, {"model": ModelState(model, options=StateDictOptions(strict=False))})
    assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).pow(2).sum().backward()
        optimizer.step()


def test_a_save_before_the_first_step_holds_no_state_and_takes_no_step(tmp_path: Path) -> None:
    steps = 0

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            nonlocal steps
            steps += 1
            return super().step(closure)

    model = nn.Linear(2, 2)
    optimizer = Own(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    saved(tmp_path, run_state(model=model, optimizers=optimizer))
    other = nn.Linear(2, 2)
    fresh = Own(other.parameters(), lr=0.5, momentum=0.9, dampening=0.5)
    restored(tmp_path, run_state(model=other, optimizers=fresh))
    assert steps == 0
    assert not any(fresh.state.values())
    stepped(model, optimizer, 2)
    stepped(other, fresh, 2)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_a_restore_goes_back_behind_state_that_came_later(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    saved(tmp_path, run_state(model=model, optimizers=optimizer))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    stepped(model, optimizer, 3)
    once = [parameter.detach().clone() for parameter in model.parameters()]
    restored(tmp_path, run_state(model=model, optimizers=optimizer))
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
    stepped(model, optimizer, 3)
    assert all(torch.equal(one, two) for one, two in zip(once, model.parameters(), strict=True))


@pytest.mark.parametrize("num_saved", [1, 2])
def test_other_parameter_groups_are_refused_by_name_unless_not_strict(tmp_path: Path, num_saved: int) -> None:
    def made(num_groups: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(2, 2)
        groups = [{"params": [parameter], "lr": 0.1} for parameter in model.parameters()]
        return model, torch.optim.SGD(groups if num_groups == 2 else model.parameters(), lr=0.3, momentum=0.9)

    model, optimizer = made(num_saved)
    stepped(model, optimizer, 1)
    saved(tmp_path, run_state(model=model, optimizers=optimizer))
    other, fresh = made(3 - num_saved)
    with pytest.raises(CheckpointException, match=r"parameter group\(s\), as the optimizer has: (bias|weight)"):
        restored(tmp_path, run_state(model=other, optimizers=fresh))
    assert not fresh.state
    options = StateDictOptions(strict=False)
    restored(tmp_path, {"model": ModelState(other), "optimizer": OptimizerState(other, [fresh], options=options)})
    assert len(fresh.state) == 2


def test_an_option_that_the_checkpoint_lacks_keeps_its_value_with_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saved(tmp_path, run_state(model=model, optimizers=optimizer))
    fresh = torch.optim.SGD(model.parameters(), lr=0.5)
    fresh.param_groups[0]["initial_lr"] = 0.5
    with caplog.at_level(logging.INFO, logger="dcp_plugins"):
        restored(tmp_path, run_state(model=model, optimizers=fresh))
    assert fresh.param_groups[0]["lr"] == 0.1
    assert fresh.param_groups[0]["initial_lr"] == 0.5
    assert [one for one in caplog.records if "initial_lr" in one.getMessage()]


def test_state_of_a_parameter_that_the_run_no_longer_has_is_an_error_that_names_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.Adam(model.parameters())
    stepped(model, optimizer, 1)
    saved(tmp_path, {"optimizer": OptimizerState(model, [optimizer])})
    smaller = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(CheckpointException, match=r"no place in the state: optimizer\.state\.1\.bias"):
        restored(tmp_path, {"optimizer": OptimizerState(smaller, [torch.optim.Adam(smaller.parameters())])})


def test_a_step_that_was_found_damaged_is_looked_at_again_if_another_process_has_saved_it_anew(tmp_path: Path) -> None:
    def save(number: float) -> None:
        with CheckpointManager(tmp_path) as other:
            other.save(1, {"weight": torch.full((50,), number)}, force=True)

    def save_anew(event: events.Event) -> None:
        if (event.name, event.kind) == ("load", "exception"):
            unsubscribe()
            save(2.0)

    save(1.0)
    (data,) = (tmp_path / "step_1").glob("*.distcp")
    weight = torch.ones(50).numpy().tobytes()
    data.write_bytes(data.read_bytes().replace(weight, bytes(len(weight))))
    unsubscribe = events.subscribe(save_anew)
    state = {"weight": torch.zeros(50)}
    with pytest.warns(UserWarning, match="whose data is damaged"):
        assert CheckpointManager(tmp_path).restore(state) == 1
    assert state["weight"].eq(2).all()
