"""Plans are reused only while nothing that ends up in them has changed."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import dcp_plugins as dcp
from dcp_plugins.plan import DefaultSavePlanner, clear_cache
from dcp_plugins.testing.ranks import run_ranks
from tests.interop.values import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing")

_made = 0


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    global _made
    clear_cache()
    _made = 0
    _count_plans(monkeypatch.setattr)
    yield
    clear_cache()


def _count_plans(setattr_: Any = setattr) -> None:
    """Count how often the coordinator plans anew."""
    import dcp_plugins.plan.save as module

    original = module.create_default_global_save_plan

    def counting(*args: Any, **kwargs: Any) -> Any:
        global _made
        _made += 1
        return original(*args, **kwargs)

    setattr_(module, "create_default_global_save_plan", counting)


def _save_and_check(folder: Any, state: dict[str, Any], **options: Any) -> int:
    """Save, load by both engines, compare bit for bit, and return how many plans were made."""
    before = _made
    dcp.save(state, checkpoint_id=folder, **options)
    for engine in (dcp, stock):
        target = {
            key: torch.zeros_like(value) if isinstance(value, torch.Tensor) else None for key, value in state.items()
        }
        engine.load(target, checkpoint_id=folder)  # type: ignore[attr-defined]
        assert_same(target, state)
    return _made - before


def test_the_second_save_of_a_state_of_the_same_description_plans_nothing(tmp_path):
    state: dict[str, Any] = {"w": torch.ones(3, 4), "n": 1}
    assert _save_and_check(tmp_path / "0", state) == 1
    assert _save_and_check(tmp_path / "1", state) == 0
    state["w"] += 5
    state["n"] = "another value"
    assert _save_and_check(tmp_path / "2", state) == 0
    assert _save_and_check(tmp_path / "3", {"w": torch.zeros(3, 4), "n": None}) == 0
    assert _save_and_check(tmp_path / "0", state) == 0


def test_a_save_in_bf16_after_one_in_fp32_says_so(tmp_path):
    """Torch compares cached plans without the dtype: its metadata would say fp32."""
    state = {"w": torch.ones(3, 4), "v": torch.ones(2)}
    for planner in (None, DefaultSavePlanner(enable_plan_caching=True)):
        clear_cache()
        _save_and_check(tmp_path / "c", state, planner=planner)
        half = {"w": torch.full((3, 4), 2.5, dtype=torch.bfloat16), "v": torch.ones(2)}
        assert _save_and_check(tmp_path / "c", half, planner=planner) == 1
        metadata = dcp.FileSystemReader(tmp_path / "c").read_metadata()
        assert metadata.state_dict_metadata["w"].properties.dtype is torch.bfloat16  # type: ignore[union-attr]


BASE: dict[str, Any] = {"w": torch.ones(4, 3), "n": 1}
CHANGES: dict[str, dict[str, Any]] = {
    "dtype": {"w": torch.ones(4, 3, dtype=torch.int32), "n": 1},
    "shape": {"w": torch.ones(3, 4), "n": 1},
    "rank": {"w": torch.ones(4, 3, 1), "n": 1},
    "new key": {"w": torch.ones(4, 3), "n": 1, "more": torch.ones(1)},
    "lost key": {"w": torch.ones(4, 3)},
    "other key": {"v": torch.ones(4, 3), "n": 1},
    "tensor to value": {"w": 5, "n": 1},
    "value to tensor": {"w": torch.ones(4, 3), "n": torch.ones(1)},
    "requires_grad": {"w": torch.ones(4, 3, requires_grad=True), "n": 1},
}


@pytest.mark.parametrize("kind", CHANGES)
def test_any_change_of_the_description_plans_anew(tmp_path, kind):
    _save_and_check(tmp_path / "c", BASE)
    assert _save_and_check(tmp_path / "c", CHANGES[kind]) == 1
    assert _save_and_check(tmp_path / "c", CHANGES[kind]) == 0
    # A state with other keys is another state, whose plan is kept beside this one's.
    is_same_state = CHANGES[kind].keys() == BASE.keys()
    assert _save_and_check(tmp_path / "c", BASE) == int(is_same_state)


def test_a_change_of_nesting_that_keeps_the_keys_plans_anew(tmp_path):
    flat, nested = {"a.b": torch.ones(2)}, {"a": {"b": torch.ones(2)}}
    for state in (flat, nested, flat):
        dcp.save(state, checkpoint_id=tmp_path)
        assert_same(dcp.load_from_keys(checkpoint_id=tmp_path), state)


def test_options_of_the_planner_are_part_of_what_is_compared(tmp_path):
    state = {"a": {"b": [1, 2]}}
    dcp.save(state, checkpoint_id=tmp_path / "flat")
    dcp.save(state, checkpoint_id=tmp_path / "not", planner=DefaultSavePlanner(flatten_state_dict=False))
    assert set(dcp.FileSystemReader(tmp_path / "not").read_metadata().state_dict_metadata) == {"a"}


def test_the_memory_format_and_storage_sharing_are_not_part_of_a_plan(tmp_path):
    _save_and_check(tmp_path / "c", BASE)
    base = torch.arange(24.0).reshape(3, 8)
    assert _save_and_check(tmp_path / "c", {"w": base[:, 1:5].t(), "n": 1}) == 0


def test_a_failed_save_does_not_poison_the_cache(tmp_path):
    state = {"w": torch.ones(2), "n": (lambda: None)}
    for _ in range(2):
        with pytest.raises(dcp.CheckpointException):
            dcp.save(state, checkpoint_id=tmp_path)
    state["n"] = 3  # type: ignore[assignment]
    _save_and_check(tmp_path, state)


def test_metadata_of_one_save_is_not_changed_by_the_next(tmp_path):
    first = dcp.save(BASE, checkpoint_id=tmp_path / "a")
    named = {info.relative_path for info in first.storage_data.values()}
    second = dcp.save(BASE, checkpoint_id=tmp_path / "b")
    assert {info.relative_path for info in first.storage_data.values()} == named
    assert {info.relative_path for info in second.storage_data.values()} != named
    first.state_dict_metadata.clear()
    first.planner_data.clear()
    _save_and_check(tmp_path / "c", BASE)


def test_plans_keep_no_tensor_alive(tmp_path):
    import weakref

    tensor = torch.ones(1000)
    alive = weakref.ref(tensor)
    dcp.save({"w": tensor}, checkpoint_id=tmp_path)
    del tensor
    gc.collect()
    assert alive() is None


def _on_ranks(folder: str) -> None:
    _count_plans()
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))

    def sharded(dtype: torch.dtype, *placements: Any, rows: int = 8) -> dict[str, Any]:
        whole = torch.arange(rows * 4).reshape(rows, 4).to(dtype)
        return {"w": distribute_tensor(whole, mesh, placements), "r": torch.ones(3)}

    def check(state: dict[str, Any], expected_plans: int) -> None:
        before = _made
        dcp.save(state, checkpoint_id=folder)
        assert _made - before == (expected_plans if rank == 0 else 0)
        dist.barrier()
        for engine in (dcp, stock):
            target = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state.items()}
            engine.load(target, checkpoint_id=folder)  # type: ignore[attr-defined]
            assert torch.equal(target["w"], state["w"].full_tensor())
            assert torch.equal(target["r"], state["r"])
        dist.barrier()

    check(sharded(torch.float32, Shard(0)), 1)
    check(sharded(torch.float32, Shard(0)), 0)
    check(sharded(torch.bfloat16, Shard(0)), 1)
    check(sharded(torch.bfloat16, Shard(1)), 1)
    check(sharded(torch.bfloat16, Replicate()), 1)
    check(sharded(torch.bfloat16, Replicate()), 0)
    check(sharded(torch.bfloat16, Replicate(), rows=5), 1)
    # Only one rank has changed: its plan alone is new, and all are asked for theirs again.
    state = {**sharded(torch.float32, Shard(0)), "r": torch.ones(3)}
    check(state, 1)
    own = {**state, **({"own": torch.ones(2)} if rank == 1 else {})}
    before = _made
    dcp.save(own, checkpoint_id=folder)
    assert _made - before == (rank == 0)
    whole = dcp.load_from_keys(checkpoint_id=folder)
    assert set(whole) == {"w", "r", "own"}
    dist.barrier()
    check(state, 1)
    # Only one rank has lost its plans.
    for forgetful in (0, 1):
        if rank == forgetful:
            clear_cache()
        check(state, 1)
        check(state, 0)


@pytest.mark.filterwarnings("ignore:Detected an existing")
def test_ranks_reuse_their_plans_together_or_not_at_all(tmp_path):
    run_ranks(2, _on_ranks, str(tmp_path / "c"))


def test_states_saved_in_turn_each_keep_their_plan(tmp_path):
    model = {"weight": torch.ones(3)}
    optimizer = {"exp_avg": torch.ones(3), "step": 1}
    counts = [_save_and_check(tmp_path / "c", state) for state in (model, optimizer) * 3]
    assert counts == [1, 1, 0, 0, 0, 0]
