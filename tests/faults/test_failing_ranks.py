"""A rank that fails, anywhere in a save or a load, is named by every rank, and what was committed stays."""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.api import CheckpointException as TorchCheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.futures import Future

import dcp_plugins as dcp
from dcp_plugins.testing.ranks import run_ranks


class Boom(Exception):
    """What the culprit raises; carries something, to see that it arrives whole."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.rank = rank

    def __str__(self) -> str:
        return f"boom on {self.rank}"


class Unpicklable(Exception):
    def __init__(self, rank: int) -> None:
        super().__init__(f"boom on {rank}")
        self.hook = lambda: None


class Unloadable(Exception):
    """Pickles, but cannot be rebuilt: its constructor wants two arguments."""

    def __init__(self, rank: int, more: str) -> None:
        super().__init__(f"boom on {rank}")


class _Culprit:
    """What is common to the classes below: to fail in one of their methods, on one rank."""

    where: str
    error: Any

    def maybe_fail(self, where: str) -> None:
        if where == self.where:
            raise self.error


def _failing(base: type, methods: list[str]) -> type:
    """Return a subclass of ``base`` whose ``methods`` fail if ``where`` says so."""

    def wrap(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.maybe_fail(name)
            return getattr(base, name)(self, *args, **kwargs)

        return method

    return type(f"Failing{base.__name__}", (_Culprit, base), {name: wrap(name) for name in methods})


SAVE_PLANNER = ["set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "resolve_data"]
WRITER = ["set_up_storage_writer", "prepare_local_plan", "prepare_global_plan", "write_data", "finish"]
LOAD_PLANNER = [
    "set_up_planner",
    "create_local_plan",
    "create_global_plan",
    "finish_plan",
    "load_bytes",
    "resolve_tensor",
]
LOAD_PLANNER += ["commit_tensor"]
READER = ["read_metadata", "set_up_storage_reader", "prepare_local_plan", "prepare_global_plan", "read_data"]
COORDINATOR_ONLY = {"create_global_plan", "prepare_global_plan", "finish"}


class Moody:
    """A Stateful that fails on demand."""

    def __init__(self, where: str, error: BaseException) -> None:
        self.where, self.error = where, error

    def state_dict(self) -> dict[str, Any]:
        if self.where == "state_dict":
            raise self.error
        return {"value": torch.ones(3)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.where == "load_state_dict":
            raise self.error


def _state(seed: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(40.0).reshape(8, 5) + seed
    sharded = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    return {"w": sharded, "replicated": torch.full((3,), seed), "epoch": seed}


def _check_raised(culprits: list[int], call: Any, kind: type, where: str) -> None:
    start = time.monotonic()
    with pytest.raises(TorchCheckpointException) as caught:
        call()
    assert time.monotonic() - start < 5, f"{where}: too slow"
    exc = caught.value
    assert isinstance(exc, Exception), "torch's derives from BaseException only; ours is caught by `except Exception`"
    assert isinstance(exc, dcp.CheckpointException)
    assert sorted(exc.failures) == culprits, where
    for rank, (failure, stack) in exc.failures.items():
        assert isinstance(failure, kind), (where, failure)
        assert f"boom on {rank}" in str(failure)
        assert stack is not None
        assert f"[rank {rank}]" in str(exc)
        assert f"boom on {rank}" in str(exc)


def _check_intact(folder: str, seed: int) -> None:
    """Check that the directory holds the checkpoint of ``seed``, and nothing of other saves."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    assert set(os.listdir(folder)) == {info.relative_path for info in metadata.storage_data.values()} | {".metadata"}
    target = {**_state(0), "epoch": None}
    dcp.load(target, checkpoint_id=folder)
    expected = _state(seed)
    assert torch.equal(target["w"].to_local(), expected["w"].to_local())
    assert torch.equal(target["replicated"], expected["replicated"])
    assert target["epoch"] == seed


def _failing_saves(folder: str, culprits: list[int]) -> None:
    warnings.simplefilter("ignore")
    rank = dist.get_rank()
    dcp.save(_state(1), checkpoint_id=folder)
    planner_class: Any = _failing(dcp.DefaultSavePlanner, SAVE_PLANNER)
    writer_class: Any = _failing(dcp.FileSystemWriter, WRITER)
    cases = [("planner", name) for name in SAVE_PLANNER] + [("writer", name) for name in WRITER]
    for part, name in cases:
        guilty = [0] if name in COORDINATOR_ONLY else culprits
        planner, writer = planner_class(), writer_class(folder)
        for obj, is_it in ((planner, part == "planner"), (writer, part == "writer")):
            obj.where = name if is_it and rank in guilty else ""
            obj.error = Boom(rank)
        _check_raised(
            guilty,
            lambda: dcp.save(_state(2), storage_writer=writer, planner=planner),  # noqa: B023 (called at once)
            Boom,
            f"{part}.{name}",
        )
        _check_intact(folder, 1)
    for error in (Boom(rank), Unpicklable(rank), Unloadable(rank, "x"), KeyboardInterrupt(f"boom on {rank}")):
        state = {**_state(2), "app": Moody("state_dict" if rank in culprits else "", error)}
        # One that cannot travel arrives as its description.
        kind = type(error) if isinstance(error, (Boom, KeyboardInterrupt)) else RuntimeError
        with pytest.raises(dcp.CheckpointException) as caught:
            dcp.save(state, checkpoint_id=folder)
        assert sorted(caught.value.failures) == culprits
        for number, (failure, _) in caught.value.failures.items():
            assert isinstance(failure, (kind, type(error)))
            assert f"boom on {number}" in str(failure)
    _check_intact(folder, 1)
    dcp.save(_state(3), checkpoint_id=folder)
    _check_intact(folder, 3)


def _failing_loads(folder: str, culprits: list[int]) -> None:
    warnings.simplefilter("ignore")
    rank = dist.get_rank()
    dcp.save(_state(1), checkpoint_id=folder)
    planner_class: Any = _failing(dcp.DefaultLoadPlanner, LOAD_PLANNER)
    reader_class: Any = _failing(dcp.FileSystemReader, READER)
    for part, name in [("planner", name) for name in LOAD_PLANNER] + [("reader", name) for name in READER]:
        guilty = [0] if name in COORDINATOR_ONLY else culprits
        planner, reader = planner_class(), reader_class(folder)
        for obj, is_it in ((planner, part == "planner"), (reader, part == "reader")):
            obj.where = name if is_it and rank in guilty else ""
            obj.error = Boom(rank)
        _check_raised(
            guilty,
            lambda: dcp.load(_state(0), storage_reader=reader, planner=planner),  # noqa: B023 (called at once)
            Boom,
            f"{part}.{name}",
        )
    _check_intact(folder, 1)


@pytest.mark.parametrize(("world_size", "culprits"), [(2, [0]), (2, [1]), (2, [0, 1]), (4, [1, 3])])
def test_a_rank_that_fails_in_any_step_of_a_save_is_named_by_all(tmp_path, world_size, culprits):
    run_ranks(world_size, _failing_saves, str(tmp_path / "c"), culprits, collective_timeout_seconds=10)


@pytest.mark.parametrize(("world_size", "culprits"), [(2, [0]), (2, [1]), (4, [1, 2])])
def test_a_rank_that_fails_in_any_step_of_a_load_is_named_by_all(tmp_path, world_size, culprits):
    run_ranks(world_size, _failing_loads, str(tmp_path / "c"), culprits, collective_timeout_seconds=10)


def _failing_load_state_dict(folder: str) -> None:
    rank = dist.get_rank()
    dcp.save({"app": Moody("", Boom(rank))}, checkpoint_id=folder)
    app = Moody("load_state_dict" if rank == 1 else "", Boom(rank))
    _check_raised([1], lambda: dcp.load({"app": app}, checkpoint_id=folder), Boom, "load_state_dict")


def test_a_stateful_that_cannot_take_its_state_is_named_by_all_ranks(tmp_path):
    run_ranks(2, _failing_load_state_dict, str(tmp_path / "c"), collective_timeout_seconds=10)


class FutureWriter(stock.FileSystemWriter):
    """A third party's writer, whose failure is set on the future that it returns."""

    def write_data(self, plan: Any, planner: Any) -> Future[Any]:
        if dist.is_initialized() and dist.get_rank() != 1:
            return super().write_data(plan, planner)
        future: Future[Any] = Future()
        future.set_exception(Boom(1))
        return future


class FutureReader(stock.FileSystemReader):
    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        if dist.is_initialized() and dist.get_rank() != 1:
            return super().read_data(plan, planner)
        future: Future[None] = Future()
        future.set_exception(Boom(1))
        return future


def _failing_futures(folder: str) -> None:
    warnings.simplefilter("ignore")
    _check_raised([1], lambda: dcp.save(_state(1), storage_writer=FutureWriter(folder)), Boom, "write")
    assert not os.path.exists(f"{folder}/.metadata")
    dcp.save(_state(1), checkpoint_id=folder)
    _check_raised([1], lambda: dcp.load(_state(0), storage_reader=FutureReader(folder)), Boom, "read")


def test_a_failure_set_on_a_future_arrives_on_every_rank(tmp_path):
    run_ranks(2, _failing_futures, str(tmp_path / "c"), collective_timeout_seconds=10)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_failure_in_a_single_process_is_wrapped_too(tmp_path):
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.save({"w": torch.ones(1)}, storage_writer=FutureWriter(tmp_path / "c"), no_dist=True)
    assert list(caught.value.failures) == [0]
    assert isinstance(caught.value.failures[0][0], Boom)
    with pytest.raises(dcp.CheckpointException):
        dcp.save({"a": Moody("state_dict", Boom(0))}, checkpoint_id=tmp_path / "c")


class Landmine:
    """Pickles well on the rank that holds it and cannot be unpickled by the others."""

    def __reduce__(self) -> Any:
        return (_explode, (dist.get_rank(),))


def _explode(rank: int) -> None:
    raise Boom(rank)


class MinedPlanner(dcp.DefaultSavePlanner):
    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        if dist.get_rank() == 1:
            plan.planner_data["mine"] = Landmine()
        return plan


def _unreadable_plan(folder: str) -> None:
    start = time.monotonic()
    with pytest.raises(dcp.CheckpointException, match="boom on 1"):
        dcp.save(_state(1), checkpoint_id=folder, planner=MinedPlanner())
    assert time.monotonic() - start < 5


def test_a_plan_that_cannot_be_unpickled_elsewhere_fails_on_every_rank_at_once(tmp_path):
    run_ranks(2, _unreadable_plan, str(tmp_path / "c"), collective_timeout_seconds=10)


def _one_rank_is_late(folder: str) -> None:
    if dist.get_rank() == 1:
        time.sleep(6)
        os._exit(0)
    with pytest.raises(dcp.CheckpointException, match="lost contact"):
        dcp.save(_state_without_mesh(), checkpoint_id=folder)


def _state_without_mesh() -> dict[str, Any]:
    return {"w": torch.ones(3)}


def test_a_rank_that_never_calls_is_missed_within_the_groups_timeout(tmp_path):
    run_ranks(2, _one_rank_is_late, str(tmp_path / "c"), collective_timeout_seconds=3, expect_deaths=True)


def _different_states(folder: str) -> None:
    rank = dist.get_rank()
    with pytest.raises(dcp.CheckpointException, match=r"w: rank 1 has|w: rank 1 holds"):
        dcp.save({"w": torch.ones(3 + rank)}, checkpoint_id=folder, planner=NoDedup())


class NoDedup(dcp.DefaultSavePlanner):
    """Leaves replicas in the plans, as a planner that is in error might."""

    def create_global_plan(self, all_plans: Any) -> Any:
        from dcp_plugins.plan import create_default_global_save_plan

        return create_default_global_save_plan(all_plans)


def test_plans_that_write_one_tensor_twice_are_refused(tmp_path):
    run_ranks(2, _different_states, str(tmp_path / "c"))
