"""Objects with a state dict, anywhere in what is saved and loaded."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dcp_plugins as dcp

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Counter:
    """A Stateful by its methods alone."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.tensor = torch.full((3,), float(count))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "tensor": self.tensor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
        self.tensor = state_dict["tensor"]


def _state(count: int) -> dict[str, Any]:
    return {
        "top": Counter(count),
        "nested": {"module": nn.Linear(2, 2), "deep": {"counter": Counter(count + 1), "number": count}},
        "several": [Counter(count + 2), {"counter": Counter(count + 3)}],
        "plain": {"number": count, "list": [count, count]},
    }


def test_a_stateful_object_is_saved_and_loaded_at_any_depth(tmp_path: Path) -> None:
    saved, target = _state(10), _state(0)
    dcp.save(saved, checkpoint_id=tmp_path / "ck")
    nested, deep, several, plain = target["nested"], target["nested"]["deep"], target["several"], target["plain"]
    top, counter = target["top"], deep["counter"]
    dcp.load(target, checkpoint_id=tmp_path / "ck")
    assert target["top"] is top
    assert top.count == 10
    assert torch.equal(top.tensor, torch.full((3,), 10.0))
    assert target["nested"] is nested
    assert nested["deep"] is deep
    assert deep["counter"] is counter
    assert (counter.count, deep["number"]) == (11, 10)
    assert torch.equal(nested["module"].weight, saved["nested"]["module"].weight)
    assert target["several"] is several
    assert (several[0].count, several[1]["counter"].count) == (12, 13)
    assert target["plain"] is plain
    assert plain == {"number": 10, "list": [10, 10]}


def test_a_mapping_that_is_itself_stateful_answers_for_itself(tmp_path: Path) -> None:
    class Registry(UserDict[str, Any]):
        def state_dict(self) -> dict[str, Any]:
            return {"names": sorted(self.data)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.data = dict.fromkeys(state_dict["names"], object())

    dcp.save({"registry": Registry(a=object(), b=object())}, checkpoint_id=tmp_path / "ck")
    target = {"registry": Registry()}
    dcp.load(target, checkpoint_id=tmp_path / "ck")
    assert sorted(target["registry"]) == ["a", "b"]
