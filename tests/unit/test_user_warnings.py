"""Warnings point at the user's line, however deep in the package they arise."""

from __future__ import annotations

import inspect
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dcp_plugins as dcp
from dcp_plugins.manager import CheckpointManager, load_state
from dcp_plugins.state_dict import get_model_state_dict, get_state_dict
from tests.programs import run_program

SAVED = {"model": {"weight": torch.ones(3)}}


def wanted(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {"model": {"weight": torch.zeros(3, dtype=dtype)}}


def save_again(folder: pathlib.Path) -> None:
    dcp.save(SAVED, checkpoint_id=folder)


def save_again_through_a_writer(folder: pathlib.Path) -> None:
    dcp.save(SAVED, storage_writer=dcp.FileSystemWriter(folder))


def save_in_the_old_order(folder: pathlib.Path) -> None:
    dcp.save(SAVED, dcp.FileSystemWriter(folder))


def save_state_dict(folder: pathlib.Path) -> None:
    dcp.save_state_dict(SAVED, dcp.FileSystemWriter(folder), no_dist=True)


def load_another_dtype(folder: pathlib.Path) -> None:
    dcp.load(wanted(), checkpoint_id=folder)


def load_state_dict(folder: pathlib.Path) -> None:
    dcp.load_state_dict(wanted(), dcp.FileSystemReader(folder), no_dist=True)


def load_in_the_old_order(folder: pathlib.Path) -> None:
    dcp.load(wanted(), dcp.FileSystemReader(folder))


def load_for_the_manager(folder: pathlib.Path) -> None:
    load_state(wanted(), folder)


def begin_a_save(folder: pathlib.Path) -> None:
    dcp.async_save(SAVED, checkpoint_id=folder.parent / "other").result()


def get_submodules(folder: pathlib.Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    get_model_state_dict(model, submodules={model[0]})


def get_submodules_and_optimizer(folder: pathlib.Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    get_state_dict(model, torch.optim.SGD(model[0].parameters()), submodules={model[0]})


def make_a_planner(folder: pathlib.Path) -> None:
    dcp.DefaultSavePlanner(dedup_replicated_tensors=True)


def restore_past_a_damaged_step(folder: pathlib.Path) -> None:
    with CheckpointManager(folder.parent / "steps", no_dist=True) as manager:
        for step in (1, 2):
            manager.save(step, SAVED)
        for file in manager.path(2).glob("*.distcp"):
            file.unlink()
        manager.restore(wanted(torch.float32))


CALLS = [value for value in list(vars().values()) if inspect.isfunction(value) and value.__module__ == __name__]
CALLS = [call for call in CALLS if list(inspect.signature(call).parameters) == ["folder"]]


def call_directly(call: Callable[..., Any], folder: pathlib.Path) -> None:
    call(folder)


def call_inside_of_torch(call: Callable[..., Any], folder: pathlib.Path) -> None:
    # torch's decorators put a frame of torch around the function.
    torch.no_grad()(call)(folder)


@pytest.mark.parametrize("surround", [call_directly, call_inside_of_torch])
@pytest.mark.parametrize("call", CALLS)
def test_a_warning_points_at_the_line_that_called_the_package(call, surround, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(SAVED, checkpoint_id=tmp_path / "c")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        surround(call, tmp_path / "c")
    lines, first = inspect.getsourcelines(call)
    assert caught
    for one in caught:
        assert one.filename == __file__, one
        assert first <= one.lineno < first + len(lines), one


PROGRAM = """
import sys, warnings
import torch
import dcp_plugins as dcp

def save(name):
    dcp.save({"x": torch.ones(1)}, checkpoint_id=f"{sys.argv[1]}/{name}")

warnings.simplefilter("default")
for name in range(3):
    save(name)  # from one line of the program: shown once
dcp.save({"x": torch.ones(1)}, checkpoint_id=f"{sys.argv[1]}/a")  # from another
"""


def test_python_shows_a_warning_once_for_each_line_of_the_program(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    shown = run_program(program, str(tmp_path), folder=tmp_path).stderr.splitlines()
    places = [line.partition(" UserWarning")[0] for line in shown if "torch.distributed is disabled" in line]
    assert places == [f"{program}:7:", f"{program}:12:"], shown
    assert '  dcp.save({"x": torch.ones(1)}, checkpoint_id=f"{sys.argv[1]}/{name}")' in shown
