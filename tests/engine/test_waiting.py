"""A save waits for the save in flight, by whatever name it is called."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import dcp_plugins as dcp

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:save_state_dict is deprecated:FutureWarning"),
]


class GatedWriter(dcp.FileSystemWriter):
    def __init__(self, path: Any, gate: threading.Event) -> None:
        super().__init__(path)
        self.gate = gate

    def write_data(self, plan: Any, planner: Any) -> Any:
        self.gate.wait()
        return super().write_data(plan, planner)


class Watching(dcp.DefaultSavePlanner):
    """Notes whether a save had ended when this one began."""

    def __init__(self, future: Any) -> None:
        super().__init__()
        self.future = future
        self.had_ended: bool | None = None

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        self.had_ended = self.future.done()
        super().set_up_planner(*args, **kwargs)


@pytest.mark.parametrize("name", ["save", "save_state_dict"])
def test_a_save_begins_when_the_save_in_flight_has_ended(tmp_path, name):
    gate = threading.Event()
    future = dcp.async_save({"x": torch.ones(3)}, storage_writer=GatedWriter(tmp_path / "c", gate))
    planner = Watching(future)
    threading.Timer(0.3, gate.set).start()
    writer = dcp.FileSystemWriter(tmp_path / "c")
    if name == "save":
        dcp.save({"x": torch.zeros(3)}, storage_writer=writer, planner=planner)
    else:
        dcp.save_state_dict({"x": torch.zeros(3)}, writer, planner=planner, no_dist=True)
    assert planner.had_ended
    assert torch.equal(dcp.load_from_keys(checkpoint_id=tmp_path / "c")["x"], torch.zeros(3))
