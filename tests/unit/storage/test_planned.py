"""Items in runs: small tensors together, in their order, and none of them written otherwise than planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from hypothesis import given
from hypothesis import strategies as st

import dcp_plugins as dcp
from dcp_plugins.contract import Metadata, MetadataIndex, SavePlan, SavePlanner, WriteItem
from dcp_plugins.errors import CheckpointException, UnsupportedValueError
from dcp_plugins.storage.planned import MAX_RUN_ITEMS, in_runs, item_bytes
from dcp_plugins.storage.threads import MIN_PARALLEL_PIECE_BYTES
from dcp_plugins.tensors import write_items
from tests.interop.values import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

NUM_TENSORS = 3 * MAX_RUN_ITEMS


@given(st.lists(st.one_of(st.none(), st.integers(0, 1000), st.integers(250_000, 270_000)), max_size=400))
def test_runs_keep_the_order_and_are_small_or_one_item(sizes: list[int | None]) -> None:
    values = [None if size is None else torch.empty(size, dtype=torch.uint8, device="cpu") for size in sizes]
    items = [item for number, value in enumerate(values) for item in write_items(str(number), value)]
    runs, sizes_bytes = in_runs(items)
    assert [item for run in runs for item in run.items] == items
    assert sizes_bytes == [sum(map(item_bytes, run.items)) for run in runs]
    for run, nbytes in zip(runs, sizes_bytes, strict=True):
        assert 1 <= len(run.items) <= MAX_RUN_ITEMS
        assert len(run.items) == 1 or nbytes < MIN_PARALLEL_PIECE_BYTES
        assert len(run.items) == 1 or all(item.tensor_data is not None for item in run.items)


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8]


def many_small_tensors() -> dict[str, Any]:
    """Return tensors of all sorts, with the odd ones at every place of a run."""
    state: dict[str, Any] = {}
    for number in range(NUM_TENSORS):
        shape = [(number % 7,), (2, number % 5), (), (3, 1, 2)][number % 4]
        state[f"t{number}"] = torch.full(shape, number % 3).to(DTYPES[number % len(DTYPES)])
    state["t17"] = torch.arange(12.0).reshape(3, 4).t()
    state["t200"] = torch.arange(12.0)[::2]
    state["t201"] = torch.tensor([1 + 2j, 3 - 1j]).conj()
    state["t202"] = torch.nn.Parameter(torch.ones(3))
    state["t300"] = torch.arange(70_000.0)
    state["number"] = 4
    return state


def test_small_tensors_of_all_sorts_are_read_by_stock_torch_and_by_us(tmp_path: Path) -> None:
    state = many_small_tensors()
    dcp.save(state, checkpoint_id=tmp_path)
    for load in (dcp.load, stock.load):
        target = {
            key: torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else 0
            for key, value in state.items()
        }
        load(target, checkpoint_id=tmp_path)
        target["t202"].requires_grad_()
        assert_same(target, state)


class Doubled(dcp.DefaultSavePlanner):
    """Saves twice the value of each tensor."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        return super().lookup_object(index) * 2


class TransposedOne(dcp.DefaultSavePlanner):
    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return object.reshape(3, 2) if write_item.index.fqn == "t5" else object


def test_a_planner_that_looks_values_up_itself_is_asked_for_each(tmp_path: Path) -> None:
    state = {f"t{number}": torch.full((2,), float(number)) for number in range(NUM_TENSORS)}
    dcp.save(state, checkpoint_id=tmp_path, planner=Doubled())
    assert_same(dcp.load_from_keys(checkpoint_id=tmp_path), {key: value * 2 for key, value in state.items()})


def test_a_planner_whose_method_was_replaced_on_the_object_is_asked_for_each(tmp_path: Path) -> None:
    state = {f"t{number}": torch.full((2,), float(number)) for number in range(NUM_TENSORS)}
    planner = dcp.DefaultSavePlanner()
    planner.resolve_data = lambda item: state[item.index.fqn] + 1  # type: ignore[method-assign]
    dcp.save(state, checkpoint_id=tmp_path, planner=planner)
    assert_same(dcp.load_from_keys(checkpoint_id=tmp_path), {key: value + 1 for key, value in state.items()})


def test_one_small_tensor_of_another_shape_than_planned_is_named(tmp_path: Path) -> None:
    state = {f"t{number}": torch.ones(2, 3) for number in range(NUM_TENSORS)}
    with pytest.raises(CheckpointException, match=r"t5: the plan says \(2, 3\) torch.float32"):
        dcp.save(state, checkpoint_id=tmp_path, planner=TransposedOne())
    assert not (tmp_path / ".metadata").exists()


class Wrapping(SavePlanner):
    """Saves the double of what another planner saves, to which it leaves all else, what it does not know too."""

    def __init__(self) -> None:
        self.inner = dcp.DefaultSavePlanner()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        self.inner.set_up_planner(*args, **kwargs)

    def create_local_plan(self) -> SavePlan:
        return self.inner.create_local_plan()

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return self.inner.create_global_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return self.inner.finish_plan(new_plan)

    def resolve_data(self, write_item: WriteItem) -> Any:
        return 2 * self.inner.resolve_data(write_item)  # type: ignore[operator]


class OneBuffer(dcp.DefaultSavePlanner):
    """Gives each tensor in the same memory."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        self.buffer: torch.Tensor = getattr(self, "buffer", torch.empty_like(object))
        return self.buffer.copy_(2 * object)


@pytest.mark.parametrize("planner", [Wrapping, OneBuffer])
@pytest.mark.parametrize("size", [3, 200_000], ids=["small", "large"])
def test_a_planner_with_hooks_of_its_own_is_asked_for_each_tensor_when_that_is_written(
    planner: type[SavePlanner], size: int, tmp_path: Path
) -> None:
    dcp.save({str(n): torch.full((size,), float(n)) for n in range(5)}, checkpoint_id=tmp_path, planner=planner())
    loaded = {str(n): torch.zeros(size) for n in range(5)}
    dcp.load(loaded, checkpoint_id=tmp_path)
    for n in range(5):
        assert (loaded[str(n)] == 2 * n).all()


# Of very many small tensors only the address is looked at.
@pytest.mark.parametrize(("left_bytes", "others"), [(0, 0), (0, 3), (16, 0)])
def test_a_tensor_whose_memory_has_been_freed_is_refused_by_name(left_bytes: int, others: int, tmp_path: Path) -> None:
    state = {"freed": torch.ones(1000), **{str(number): torch.ones(1000) for number in range(others)}}
    state["freed"].untyped_storage().resize_(left_bytes)
    with pytest.raises(CheckpointException, match="freed: the tensor needs 4000 bytes of its storage, which has"):
        dcp.save(state, checkpoint_id=tmp_path)


@pytest.mark.parametrize("others", [0, 3])
def test_a_tensor_whose_memory_has_been_freed_is_not_staged(others: int, tmp_path: Path) -> None:
    state = {"freed": torch.ones(1000), **{str(number): torch.ones(1000) for number in range(others)}}
    state["freed"].untyped_storage().resize_(0)
    with pytest.raises(UnsupportedValueError, match="freed: the tensor has no memory"):
        dcp.async_save(state, checkpoint_id=tmp_path)
