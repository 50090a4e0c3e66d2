"""Plugins that fail on one rank in one of their methods, before or after what the method does."""

from __future__ import annotations

import warnings
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist

import dcp_plugins as dcp
from dcp_plugins.engine import AsyncCheckpointerType
from dcp_plugins.staging import BlockingAsyncStager
from tests.torture.acting import Hit

__all__ = ["METHODS", "fail_in_each_method"]

_SAVE_PLANNER = ["set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "resolve_data"]
_WRITER = ["reset", "set_up_storage_writer", "prepare_local_plan", "prepare_global_plan", "write_data", "finish"]
_WRITER += ["storage_meta"]
_STAGER = ["stage", "synchronize_staging"]
_LOAD_PLANNER = ["set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "load_bytes"]
_LOAD_PLANNER += ["resolve_tensor", "commit_tensor"]
_READER = ["reset", "read_metadata", "set_up_storage_reader", "prepare_local_plan", "prepare_global_plan", "read_data"]


def _failing(name: str, base: Any, methods: list[str]) -> Any:
    """Return a subclass whose methods fail if its attribute ``fails`` names them."""

    def wrapped(method: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.fails == (method, "before"):
                raise Hit(method)
            result = getattr(base, method)(self, *args, **kwargs)
            if self.fails == (method, "after"):
                raise Hit(method)
            return result

        return call

    # Under a name of this module, so that a checkpoint process finds it.
    return type(
        name, (base,), {**{method: wrapped(method) for method in methods}, "fails": None, "__module__": __name__}
    )


FailingSavePlanner = _failing("FailingSavePlanner", dcp.DefaultSavePlanner, _SAVE_PLANNER)
FailingWriter = _failing("FailingWriter", dcp.FileSystemWriter, _WRITER)
FailingStager = _failing("FailingStager", BlockingAsyncStager, _STAGER)
FailingLoadPlanner = _failing("FailingLoadPlanner", dcp.DefaultLoadPlanner, _LOAD_PLANNER)
FailingReader = _failing("FailingReader", dcp.FileSystemReader, _READER)

_SAVING = [("planner", method) for method in _SAVE_PLANNER] + [("writer", method) for method in _WRITER]
METHODS = {
    "sync": _SAVING,
    "thread": [*_SAVING, *(("stager", method) for method in _STAGER)],
    "process": _SAVING,
    "load": [("planner", method) for method in _LOAD_PLANNER] + [("reader", method) for method in _READER],
}


def fail_in_each_method(operation: str, victim: int, folder: str) -> int:
    """Be a rank of those that save or load once for each method that fails; return how many failed somewhere."""
    warnings.simplefilter("ignore")
    _save(1, f"{folder}/c", "sync", "", ("", ""))
    return sum(
        _fail(operation, f"{folder}/c", part if dist.get_rank() == victim else "", (method, when), victim)
        for part, method in METHODS[operation]
        for when in ("before", "after")
    )


def _fail(operation: str, folder: str, part: str, fails: tuple[str, str], victim: int) -> bool:
    target = {"w": torch.zeros(5), "seed": 0}
    try:
        if operation == "load":
            planner, reader = FailingLoadPlanner(), FailingReader(folder)
            _arm(part, fails, planner=planner, reader=reader)
            dcp.load(target, storage_reader=reader, checkpoint_id=folder, planner=planner)
        else:
            _save(2, folder, operation, part, fails)
        named, outcome = {victim}, "returned"
    except dcp.CheckpointException as exc:
        named, outcome = set(exc.failures), "raised"
    except Hit:
        # Its own failure, as it is: of what is done before the ranks talk.
        assert part
        named, outcome = {victim}, "raised"
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (outcome, named))
    assert len({one for one, _ in outcomes}) == 1, f"{operation}, {fails}: {outcomes}"
    assert all(found == {victim} for _, found in outcomes), (
        f"{operation}, {fails}: the culprit is not named: {outcomes}"
    )
    dcp.load(target, checkpoint_id=folder)
    seed = target["seed"]
    assert torch.equal(target["w"], torch.full((5,), float(seed)))
    # An error of a plugin after the commit is one of every rank.
    is_late = fails == ("finish", "after") and victim == 0
    if operation != "load":
        assert seed == (2 if outcome == "returned" or is_late else 1), f"{operation}, {fails}: {outcome}, held {seed}"
        _save(1, folder, "sync", "", fails)
    return outcome == "raised"


def _arm(part: str, fails: tuple[str, str], **plugins: Any) -> None:
    for name, plugin in plugins.items():
        if name == part:
            plugin.fails = fails


def _save(seed: int, folder: str, operation: str, part: str, fails: tuple[str, str]) -> None:
    planner, writer = FailingSavePlanner(), FailingWriter(folder)
    _arm(part, fails, planner=planner, writer=writer)
    state = {"w": torch.full((5,), float(seed)), "seed": seed}
    options = {"storage_writer": writer, "planner": planner, "checkpoint_id": folder}
    if operation == "sync":
        dcp.save(state, **options)
        return
    if operation == "thread":
        options["async_stager"] = FailingStager()
        _arm(part, fails, stager=options["async_stager"])
    future = dcp.async_save(state, async_checkpointer_type=AsyncCheckpointerType(operation), **options)
    assert isinstance(future, Future)
    future.result()
