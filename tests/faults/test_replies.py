"""A reply of the coordinator that does not survive the journey fails on every rank, or on none."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointNotFoundError, UnsupportedValueError
from dcp_plugins.testing.ranks import run_ranks

COORDINATOR = 1


class Boom(Exception):
    """Raised where an object is unpickled."""


class Landmine:
    """Can be pickled, and be unpickled on the rank that made it only."""

    def __init__(self) -> None:
        self.home = dist.get_rank()

    def __reduce__(self) -> Any:
        return _arrive, (self.home,)


def _arrive(home: int) -> Landmine:
    if dist.get_rank() != home:
        raise Boom(f"boom from {home}")
    return Landmine()


class Unpicklable:
    def __reduce__(self) -> Any:
        raise Boom("cannot be sent")


def _state(seed: int) -> dict[str, Any]:
    return {"w": torch.full((4,), float(seed)), "epoch": seed}


class SavePlanner(dcp.DefaultSavePlanner):
    """Puts an object into the plan that goes back to each rank."""

    def __init__(self, content: Callable[[], Any]) -> None:
        super().__init__()
        self.content = content

    def create_global_plan(self, all_plans: Any) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        return [dataclasses.replace(plan, planner_data=self.content()) for plan in plans], metadata


class LoadPlanner(dcp.DefaultLoadPlanner):
    def __init__(self, content: Callable[[], Any]) -> None:
        super().__init__()
        self.content = content

    def create_global_plan(self, global_plan: Any) -> Any:
        return [dataclasses.replace(plan, planner_data=self.content()) for plan in global_plan]


class FewPlans(dcp.DefaultLoadPlanner):
    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def create_global_plan(self, global_plan: Any) -> Any:
        return self.result


class Writer(dcp.FileSystemWriter):
    """Adds an object to the metadata once it is committed."""

    content: Callable[[], Any]

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        metadata.planner_data["more"] = self.content()


def raised_by(call: Callable[[], Any]) -> dcp.CheckpointException:
    began = time.monotonic()
    with pytest.raises(dcp.CheckpointException) as caught:
        call()
    # The group's timeout is far beyond: no rank has waited for another one.
    assert time.monotonic() - began < 30
    return caught.value


def save(folder: str, seed: int, **options: Any) -> Any:
    writer = options.pop("writer", None) or dcp.FileSystemWriter(folder)
    return dcp.save_state_dict(_state(seed), writer, coordinator_rank=COORDINATOR, **options)


def load(folder: str, **options: Any) -> dict[str, Any]:
    target = {"w": torch.zeros(4), "epoch": 0}
    dcp.load_state_dict(target, dcp.FileSystemReader(folder), coordinator_rank=COORDINATOR, **options)
    return target


def check_intact(folder: str, seed: int) -> None:
    target = load(folder)
    assert torch.equal(target["w"], _state(seed)["w"])
    assert target["epoch"] == seed


def on_ranks(check: Callable[[str], Any], folder: Any, world_size: int = 3) -> list[Any]:
    return run_ranks(world_size, _quietly, check, str(folder), collective_timeout_seconds=50)


def _quietly(check: Callable[[str], Any], folder: str) -> Any:
    warnings.simplefilter("ignore")
    return check(folder)


def _unreadable_save_plan(folder: str) -> None:
    save(folder, 1)
    exc = raised_by(lambda: save(folder, 2, planner=SavePlanner(Landmine)))
    assert sorted(exc.failures) == [0, 2]
    for failure, stack in exc.failures.values():
        assert isinstance(failure, UnsupportedValueError)
        assert "in step 'plan'" in str(failure)
        assert "boom from 1" in str(failure)
        assert stack
    check_intact(folder, 1)
    save(folder, 3)
    check_intact(folder, 3)


def test_a_save_plan_that_some_ranks_cannot_unpickle_is_reported_by_all_with_rank_and_step(tmp_path):
    on_ranks(_unreadable_save_plan, tmp_path / "c")


def _unsendable_save_plan(folder: str) -> None:
    save(folder, 1)
    exc = raised_by(lambda: save(folder, 2, planner=SavePlanner(Unpicklable)))
    assert sorted(exc.failures) == [COORDINATOR]
    assert "cannot be sent" in str(exc)
    assert str(exc).startswith("plan:")
    check_intact(folder, 1)


def test_a_save_plan_that_cannot_be_sent_is_the_coordinators_failure_on_all_ranks(tmp_path):
    on_ranks(_unsendable_save_plan, tmp_path / "c")


def _load_plans(folder: str) -> None:
    save(folder, 1)
    exc = raised_by(lambda: load(folder, planner=LoadPlanner(Landmine)))
    assert sorted(exc.failures) == [0, 2]
    assert "in step 'plan'" in str(exc)
    exc = raised_by(lambda: load(folder, planner=LoadPlanner(Unpicklable)))
    assert sorted(exc.failures) == [COORDINATOR]
    results: list[Any] = [[], None, 7]
    for result in results:
        exc = raised_by(lambda: load(folder, planner=FewPlans(result)))  # noqa: B023 (called at once)
        assert sorted(exc.failures) == [COORDINATOR]
    check_intact(folder, 1)


def test_a_load_plan_that_does_not_arrive_is_reported_by_all_ranks(tmp_path):
    on_ranks(_load_plans, tmp_path / "c")


def _unsendable_metadata(folder: str) -> None:
    writer = Writer(folder)
    writer.content = Unpicklable
    exc = raised_by(lambda: save(folder, 2, writer=writer))
    assert sorted(exc.failures) == [COORDINATOR]
    assert str(exc).startswith("write:")
    assert "cannot be sent" in str(exc)


def test_metadata_that_cannot_be_sent_is_the_coordinators_failure_on_all_ranks(tmp_path):
    on_ranks(_unsendable_metadata, tmp_path / "c")


def _unreadable_metadata(folder: str) -> list[str]:
    writer = Writer(folder)
    writer.content = Landmine
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metadata = save(folder, 2, writer=writer)
    check_intact(folder, 2)
    if dist.get_rank() == COORDINATOR:
        assert set(metadata.state_dict_metadata) == {"w", "epoch"}
    else:
        for name in ("state_dict_metadata", "planner_data", "storage_data"):
            with pytest.raises(UnsupportedValueError, match="not available on this rank"):
                getattr(metadata, name)
    return [str(one.message) for one in caught if "the save is complete" in str(one.message)]


def test_metadata_that_some_ranks_cannot_unpickle_does_not_fail_the_committed_save(tmp_path):
    told = on_ranks(_unreadable_metadata, tmp_path / "c")
    assert [len(messages) for messages in told] == [1, 0, 1]
    assert "boom from 1" in told[0][0]


class NoReset(dcp.FileSystemWriter):
    def reset(self, checkpoint_id: Any = None) -> None:
        raise Boom("no reset")


class NoResetReader(dcp.FileSystemReader):
    def reset(self, checkpoint_id: Any = None) -> None:
        raise Boom("no reset")


def _storage_missing_on_one_rank(folder: str) -> None:
    dcp.save(_state(1), checkpoint_id=folder)
    is_culprit = dist.get_rank() == 1
    named = None if is_culprit else folder
    target = {"w": torch.zeros(4), "epoch": 0}
    writer, reader = dcp.FileSystemWriter(folder), dcp.FileSystemReader(folder)
    calls: list[tuple[Callable[[], Any], type[Exception]]] = [
        (lambda: dcp.save(_state(2), checkpoint_id=named), RuntimeError),
        (lambda: dcp.save(_state(2), checkpoint_id=named, use_collectives=False), RuntimeError),
        (lambda: dcp.load(target, checkpoint_id=named), RuntimeError),
        (lambda: save(folder, 2, writer=NoReset(folder) if is_culprit else writer), Boom),
        (lambda: dcp.load_state_dict(target, NoResetReader(folder) if is_culprit else reader), Boom),
    ]
    for call, kind in calls:
        if is_culprit:
            # Its own mistake, as it is.
            with pytest.raises(kind) as caught:
                call()
            assert not isinstance(caught.value, dcp.CheckpointException)
        else:
            exc = raised_by(call)
            assert sorted(exc.failures) == [1]
            assert isinstance(exc.failures[1][0], kind)
    dcp.save(_state(3), checkpoint_id=folder)
    check_intact(folder, 3)


def test_a_rank_that_cannot_open_the_storage_is_named_by_the_others(tmp_path):
    on_ranks(_storage_missing_on_one_rank, tmp_path / "c")


def _missing_metadata_of_an_optimizer(folder: str) -> None:
    path = folder if dist.get_rank() == 0 else f"{folder}-elsewhere"
    dcp.save({"optim": {"state": {"w": {"step": torch.ones(1)}}}}, checkpoint_id=folder)
    with pytest.raises((dcp.CheckpointException, CheckpointNotFoundError)) as caught:
        dcp.load_sharded_optimizer_state_dict({}, "optim", dcp.FileSystemReader(path))
    if dist.get_rank() == 0:
        assert isinstance(caught.value, dcp.CheckpointException)
        assert sorted(caught.value.failures) == [1, 2]
    else:
        assert isinstance(caught.value, CheckpointNotFoundError)


def test_a_rank_that_cannot_read_an_optimizers_metadata_is_named_by_the_others(tmp_path):
    on_ranks(_missing_metadata_of_an_optimizer, tmp_path / "c")


COLLECTIVES = ("gather_object", "scatter_object_list", "broadcast_object_list", "all_gather_object", "all_reduce")


def counted(call: Callable[[], Any]) -> list[str]:
    """Return the collectives that a call runs."""
    seen: list[str] = []
    real = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return real[name](*args, **kwargs)

        return collective

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        call()
    finally:
        for name in COLLECTIVES:
            setattr(dist, name, real[name])
    return seen


def _count(folder: str) -> list[list[str]]:
    target = {"w": torch.zeros(4), "epoch": 0}
    state = _state(1)
    calls: list[Callable[[], Any]] = [
        lambda: dcp.save(state, checkpoint_id=folder),
        lambda: dcp.save(state, checkpoint_id=folder),
        lambda: dcp.load(target, checkpoint_id=folder),
    ]
    return [counted(call) for call in calls]


def test_a_save_and_a_load_run_four_and_three_collectives(tmp_path):
    saving = ["gather_object", "scatter_object_list", "gather_object", "broadcast_object_list"]
    expected = [saving, saving, ["all_gather_object"] * 3]
    assert on_ranks(_count, tmp_path / "c", world_size=2) == [expected, expected]
