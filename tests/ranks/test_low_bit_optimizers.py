"""torchao's low-bit optimizers resume exactly: through state dicts, the manager and Accelerate, whole and sharded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.state_dict import get_state_dict as torch_get_state_dict
from torch.distributed.checkpoint.state_dict import set_state_dict as torch_set_state_dict

import dcp_plugins as dcp
from dcp_plugins.engine import AsyncCheckpointerType
from dcp_plugins.engine.process_runner import process_runner
from dcp_plugins.manager import load_state, run_state
from dcp_plugins.staging import release_staging_memory
from dcp_plugins.state_dict import get_state_dict, set_state_dict
from dcp_plugins.testing.ranks import run_ranks
from tests.ranks.low_bit import OPTIMIZERS, LowBitRun, differences, num_low_bit

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def state_of(run: LowBitRun, get: Any = get_state_dict) -> dict[str, Any]:
    with torch.compiler.set_stance("force_eager"):
        model, optimizer = get(run.model, run.optimizer)
    return {"model": model, "optimizer": optimizer}


def save(kind: str, state: dict[str, Any], path: Path) -> None:
    if kind == "sync":
        dcp.save(state, checkpoint_id=path)
    else:
        how = AsyncCheckpointerType.THREAD if kind == "thread" else AsyncCheckpointerType.PROCESS
        dcp.async_save(state, checkpoint_id=path, async_checkpointer_type=how).result()


def resumed(run: LowBitRun, path: Path, *, stock: bool = False) -> LowBitRun:
    get, put = (torch_get_state_dict, torch_set_state_dict) if stock else (get_state_dict, set_state_dict)
    state = state_of(run, get)
    (torch_dcp if stock else dcp).load(state, checkpoint_id=path)
    put(run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return run


def save_and_resume(name: str, sharded: bool, root: Path) -> list[tuple[str, list[str], int]]:
    """Return, for each kind of save, what differs three steps after the resume, and how much state is low-bit."""
    found = []
    for kind in ("sync", "thread", "process"):
        run = LowBitRun(name, sharded=sharded)
        run.train(2)
        save(kind, state_of(run), root / kind)
        again = resumed(LowBitRun(name, seed=1, sharded=sharded), root / kind)
        again.steps = run.steps
        num_found = num_low_bit(again)
        run.train(3)
        again.train(3)
        found.append((kind, differences(run, again), num_found))
    return found


def save_and_resume_all(sharded: bool, root: Path) -> dict[str, list[tuple[str, list[str], int]]]:
    found = {name: save_and_resume(name, sharded, root / name) for name in OPTIMIZERS}
    process_runner.close()
    release_staging_memory()
    return found


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_low_bit_optimizers_whole_and_sharded_go_on_as_if_they_had_never_stopped(
    num_ranks: int, tmp_path: Path
) -> None:
    as_before: list[Any] = [("sync", [], 4), ("thread", [], 4), ("process", [], 4)]
    for found in run_ranks(num_ranks, save_and_resume_all, num_ranks > 1, tmp_path, timeout_seconds=150):
        assert found == dict.fromkeys(OPTIMIZERS, as_before)


def save_sharded(name: str, ours: Path, torchs: Path) -> None:
    run = LowBitRun(name, sharded=True)
    run.train(2)
    dcp.save(state_of(run), checkpoint_id=ours)
    torch_dcp.save(state_of(run, torch_get_state_dict), checkpoint_id=torchs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_ranks_shards_of_low_bit_state_are_one_on_one_rank_for_torch_and_for_us(name: str, tmp_path: Path) -> None:
    run_ranks(2, save_sharded, name, tmp_path / "ours", tmp_path / "torchs")
    by_torch = resumed(LowBitRun(name, seed=1), tmp_path / "torchs", stock=True)
    assert num_low_bit(by_torch) == 4
    assert differences(by_torch, resumed(LowBitRun(name, seed=2), tmp_path / "ours")) == []
    assert differences(by_torch, resumed(LowBitRun(name, seed=3), tmp_path / "torchs")) == []
    assert differences(by_torch, resumed(LowBitRun(name, seed=4), tmp_path / "ours", stock=True)) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_manager_resumes_a_low_bit_optimizer(name: str, tmp_path: Path) -> None:
    run = LowBitRun(name)
    run.train(2)
    again = LowBitRun(name, seed=1)
    with torch.compiler.set_stance("force_eager"):
        dcp.save(run_state(model=run.model, optimizers=run.optimizer), checkpoint_id=tmp_path)
        load_state(run_state(model=again.model, optimizers=again.optimizer), tmp_path)
    again.steps = run.steps
    run.train(3)
    again.train(3)
    assert differences(run, again) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_setting_low_bit_state_does_not_share_memory_with_it(name: str) -> None:
    run = LowBitRun(name)
    run.train(2)
    state = state_of(run)
    kept = copy.deepcopy(run.tensors()["0.weight.exp_avg"].codes)
    again = LowBitRun(name, seed=1)
    set_state_dict(again.model, again.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert num_low_bit(again) == 4
    again.steps = run.steps
    again.train(1)
    assert torch.equal(run.tensors()["0.weight.exp_avg"].codes, kept)
