"""What a load leaves unread below a container that it was given is named, once."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointException, UnreadValuesWarning
from dcp_plugins.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from dcp_plugins.testing.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing")


def warned(folder: Path, target: dict[str, Any], **kwargs: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnreadValuesWarning)
        dcp.load(target, checkpoint_id=folder, **kwargs)
    return [str(one.message) for one in caught if issubclass(one.category, UnreadValuesWarning)]


@pytest.mark.parametrize(
    ("saved", "target", "name"),
    [
        ({"h": {"a": 1, "b": 2}}, {"h": {}}, "h.a, h.b"),
        ({"h": {"a": torch.ones(2)}}, {"h": {}}, "h.a"),
        ({"h": [{"a": 1}, {"a": 2}]}, {"h": [{"a": 0}]}, "h.1.a"),
        ({"h": {"a": 1, "b": {"c": 2}}}, {"h": {"a": 0}}, "h.b.c"),
        ({"h": {"deep": {"a": 1, "b": 2}}}, {"h": {"deep": {"a": 0}}}, "h.deep.b"),
    ],
)
def test_saved_values_below_a_container_that_was_given_are_named_in_one_warning(
    tmp_path: Path, saved: Any, target: Any, name: str
) -> None:
    dcp.save(saved, checkpoint_id=tmp_path)
    (message,) = warned(tmp_path, target)
    assert f"not loaded: {name}." in message


def test_a_part_of_a_checkpoint_is_loaded_without_a_warning(tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.ones(2)}, "optimizer": {"m": torch.ones(2)}, "step": 1}, checkpoint_id=tmp_path)
    assert warned(tmp_path, {"model": {"w": torch.zeros(2)}}) == []
    assert warned(tmp_path, {"step": 0}) == []


def test_a_tensor_without_elements_is_not_called_unread(tmp_path: Path) -> None:
    dcp.save({"h": {"a": torch.empty(0, 3), "b": 1}}, checkpoint_id=tmp_path)
    assert warned(tmp_path, {"h": {"a": torch.empty(0, 3), "b": 0}}) == []


def test_at_most_twelve_are_named_with_the_count_of_the_rest(tmp_path: Path) -> None:
    dcp.save({"h": {f"k{number:02}": number for number in range(40)}}, checkpoint_id=tmp_path)
    (message,) = warned(tmp_path, {"h": {"k00": 0}})
    assert message.startswith("39 saved value(s)")
    assert message.count("h.k") == 12
    assert "(27 more)" in message


def test_the_planner_makes_it_an_error_or_silent(tmp_path: Path) -> None:
    dcp.save({"h": {"a": 1, "b": 2}}, checkpoint_id=tmp_path)
    assert warned(tmp_path, {"h": {"a": 0}}, planner=dcp.DefaultLoadPlanner(unread="ignore")) == []
    with pytest.raises(CheckpointException, match=r"no place in the state: h\.b"):
        dcp.load({"h": {"a": 0}}, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(unread="error"))
    with pytest.raises(ValueError, match="unread must be one of error, ignore, warn, got 'shout'"):
        dcp.DefaultLoadPlanner(unread="shout")  # type: ignore[arg-type]


def _each_its_own(folder: str, leave: bool) -> list[str]:
    rank = dist.get_rank()
    dcp.save({"h": {str(rank): torch.full((2,), rank)}}, checkpoint_id=folder)
    own = {"h": {"0": torch.zeros(2, dtype=torch.int64)} if leave else {str(rank): torch.zeros(2, dtype=torch.int64)}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcp.load(own, checkpoint_id=folder)
    return [str(one.message) for one in caught if issubclass(one.category, UnreadValuesWarning)]


def test_what_another_rank_reads_is_not_called_unread(tmp_path: Path) -> None:
    assert run_ranks(2, _each_its_own, str(tmp_path), False) == [[], []]


def test_only_the_coordinator_warns_of_what_no_rank_reads(tmp_path: Path) -> None:
    first, second = run_ranks(2, _each_its_own, str(tmp_path), True)
    assert len(first) == 1
    assert "h.1" in first[0]
    assert second == []


class Late(torch.optim.SGD):
    """Makes state at the second step, and counts in the group."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        group = self.param_groups[0]
        group["k"] = group.get("k", 0) + 1
        if group["k"] > 1:
            for parameter in group["params"]:
                self.state[parameter].setdefault("late", []).append(parameter.detach().clone())
        return loss


def stepped(num_steps: int) -> tuple[nn.Module, Late]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = Late(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return model, optimizer


def _pickled(state: Any) -> Any:
    return pickle.loads(pickle.dumps(state))


@pytest.mark.parametrize(
    "copied",
    [lambda state: state, dict, copy.copy, copy.deepcopy, lambda state: {**state}],
    ids=["itself", "dict", "copy", "deepcopy", "unpacked"],
)
def test_a_copy_of_a_getters_state_dict_completes_itself(tmp_path: Path, copied: Any) -> None:
    model, optimizer = stepped(3)
    dcp.save({"o": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    other, fresh = stepped(0)
    target = {"o": copied(get_optimizer_state_dict(other, fresh))}
    assert warned(tmp_path, target) == []
    set_optimizer_state_dict(other, fresh, target["o"])
    assert fresh.param_groups[0]["k"] == 3
    assert [len(fresh.state[parameter]["late"]) for parameter in other.parameters()] == [2, 2]


def test_a_pickled_copy_is_a_plain_dict_and_gives_the_warning(tmp_path: Path) -> None:
    model, optimizer = stepped(3)
    dcp.save({"o": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    other, fresh = stepped(0)
    (message,) = warned(tmp_path, {"o": _pickled(get_optimizer_state_dict(other, fresh))})
    assert "o.param_groups.0.k" in message
    assert "o.state.weight.late.0" in message


@pytest.mark.parametrize("how", ["torch.save", "dcp.save", "stock"])
def test_what_completes_a_state_dict_reaches_no_file(tmp_path: Path, how: str) -> None:
    import torch.distributed.checkpoint as stock

    model, optimizer = stepped(3)
    state = get_optimizer_state_dict(model, optimizer)
    if how == "torch.save":
        torch.save(state, tmp_path / "file.pt")
        assert torch.load(tmp_path / "file.pt", weights_only=True)["param_groups"][0]["k"] == 3
        content = (tmp_path / "file.pt").read_bytes()
    else:
        (dcp if how == "dcp.save" else stock).save({"o": state}, checkpoint_id=tmp_path)
        content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"dcp_plugins" not in content
