"""Saves of the engine and the manager, for the campaigns on system calls."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import dcp_plugins as dcp
from dcp_plugins.engine import AsyncCheckpointerType
from dcp_plugins.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from dcp_plugins.manager import CheckpointManager, KeepLatest
from dcp_plugins.storage.companion import CompanionWriter
from tests.faults.checks import state_of
from tests.interop.values import assert_same, blank, patterned
from tests.torture.scenario import Scenario, unnamed

__all__ = ["ENGINE", "STOCK"]


def _held(folder: Path, expected: Callable[[int], dict[str, Any]], **options: Any) -> int | None:
    target: dict[str, Any] = blank(expected(0))
    try:
        dcp.load(target, no_dist=True, **({"checkpoint_id": folder} | options))
    except dcp.CheckpointException as exc:
        if "no committed checkpoint" in str(exc) or "CheckpointNotFoundError" in str(exc):
            return None
        raise
    seed = int(target["epoch"])
    assert_same(target, expected(seed))
    return seed


# One process.


def _save(folder: Path, seed: int) -> None:
    dcp.save(state_of(seed), checkpoint_id=folder)


def _held_state(folder: Path) -> int | None:
    return _held(folder, state_of)


def _save_in_several_files(folder: Path, seed: int) -> None:
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False, thread_count=2)
    dcp.save(state_of(seed), storage_writer=writer)


def _save_on_a_thread(folder: Path, seed: int) -> None:
    dcp.async_save(state_of(seed), checkpoint_id=folder).result()


def _save_in_a_process(folder: Path, seed: int) -> None:
    dcp.async_save(state_of(seed), checkpoint_id=folder, async_checkpointer_type=AsyncCheckpointerType.PROCESS).result()


def _save_with_a_companion(folder: Path, seed: int) -> None:
    dcp.save(state_of(seed), storage_writer=CompanionWriter(folder, name="meta.pt", content=b"%d" % seed))


def _held_with_a_companion(folder: Path) -> int | None:
    """Return the seed; the companion that a reader of the pair finds is of the same save."""
    seed = _held_state(folder)
    if seed is not None:
        # The new one of a save that has not committed may hold anything.
        found = [
            (folder / name).read_bytes()
            for name in ("meta.pt", "meta.pt.new", "meta.pt.replaced")
            if (folder / name).exists()
        ]
        assert b"%d" % seed in found, f"the checkpoint is of seed {seed}, its companions hold {found}"
    return seed


def _litter_beside_a_companion(folder: Path) -> set[str]:
    return unnamed(folder, "meta.pt")


# Stock torch writes over what is there: the campaigns are to find that.


def _save_by_stock(folder: Path, seed: int) -> None:
    stock.save(state_of(seed), checkpoint_id=folder)


# Safetensors.


def _tensors_of(seed: int) -> dict[str, Any]:
    model = {f"model.{name}": value for name, value in state_of(seed)["model"].items()}
    return {**model, "epoch": torch.tensor(seed)}


def _save_safetensors(folder: Path, seed: int) -> None:
    dcp.save(_tensors_of(seed), storage_writer=HuggingFaceStorageWriter(folder))


def _save_several_safetensors(folder: Path, seed: int) -> None:
    files = {name: 1 + number % 3 for number, name in enumerate(_tensors_of(0))}
    dcp.save(_tensors_of(seed), storage_writer=HuggingFaceStorageWriter(folder, fqn_to_index_mapping=files))


def _held_safetensors(folder: Path) -> int | None:
    return _held(folder, _tensors_of, checkpoint_id=None, storage_reader=HuggingFaceStorageReader(folder))


def _safetensors_litter(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if not name.startswith("model") or name.endswith(".tmp")}


# Two ranks.


def _sharded(seed: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = patterned(torch.float32, 64, 32, seed=seed)
    own = {f"of rank {dist.get_rank()}": torch.full((3,), seed)}
    return {"w": distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None), **own, "epoch": seed}


def _whole(seed: int) -> dict[str, Any]:
    own = {f"of rank {rank}": torch.full((3,), seed) for rank in range(2)}
    return {"w": patterned(torch.float32, 64, 32, seed=seed), **own, "epoch": seed}


def _save_sharded(folder: Path, seed: int) -> None:
    dcp.save(_sharded(seed), checkpoint_id=folder)


def _save_sharded_in_a_process(folder: Path, seed: int) -> None:
    dcp.async_save(_sharded(seed), checkpoint_id=folder, async_checkpointer_type=AsyncCheckpointerType.PROCESS).result()


def _held_sharded(folder: Path) -> int | None:
    return _held(folder, _whole)


def _own_state(seed: int) -> dict[str, Any]:
    return {f"rank {dist.get_rank()}": state_of(seed)["model"], "epoch": seed}


def _save_apart(folder: Path, seed: int) -> None:
    dcp.save(_own_state(seed), checkpoint_id=folder, use_collectives=False)


def _held_apart(folder: Path) -> int | None:
    target: dict[str, Any] = blank(_own_state(0))
    try:
        dcp.load(target, checkpoint_id=folder, no_dist=False)
    except dcp.CheckpointException as exc:
        if "no committed checkpoint" in str(exc):
            return None
        raise
    seed = int(target["epoch"])
    assert_same(target, _own_state(seed))
    return seed


def _litter_apart(folder: Path) -> set[str]:
    names = set(os.listdir(folder))
    kept = {f"__{rank}.metadata" for rank in range(2)}
    data = {name for name in names if name.endswith(".distcp")}
    return names - kept - (data if len(data) == 2 else set())


# The manager.

_KEPT = 2


def _manager(folder: Path) -> CheckpointManager:
    return CheckpointManager(folder, keep_policy=KeepLatest(_KEPT))


def _save_managed(folder: Path, seed: int) -> None:
    """Save steps up to the seed's, beginning behind those that are there."""
    with _manager(folder) as manager:
        for step in range((manager.latest_step or 0) + 1, seed + 1):
            manager.save(step, state_of(step))


def _held_managed(folder: Path) -> int | None:
    with _manager(folder) as manager:
        for step in manager.all_steps():
            target: dict[str, Any] = blank(state_of(0))
            assert manager.restore(target, step) == step
            assert_same(target, state_of(step))
        return manager.latest_step


def _managed_litter(folder: Path) -> set[str]:
    with _manager(folder) as manager:
        steps = manager.all_steps()
        assert len(steps) <= _KEPT, f"kept are {steps}"
        litter = set(os.listdir(folder)) - {manager.path(step).name for step in steps}
        return litter.union(*(unnamed(manager.path(step)) for step in steps))


ENGINE = (
    Scenario("save", _save, _held_state, unnamed),
    Scenario("several files", _save_in_several_files, _held_state, unnamed),
    Scenario("thread", _save_on_a_thread, _held_state, unnamed),
    Scenario("process", _save_in_a_process, _held_state, unnamed, is_slow=True),
    Scenario("companion", _save_with_a_companion, _held_with_a_companion, _litter_beside_a_companion),
    Scenario("safetensors", _save_safetensors, _held_safetensors, _safetensors_litter, in_one_step=False),
    Scenario(
        "several safetensors", _save_several_safetensors, _held_safetensors, _safetensors_litter, in_one_step=False
    ),
    Scenario("two ranks", _save_sharded, _held_sharded, unnamed, ranks=2),
    Scenario("two ranks, process", _save_sharded_in_a_process, _held_sharded, unnamed, ranks=2, is_slow=True),
    Scenario("two ranks apart", _save_apart, _held_apart, _litter_apart, ranks=2, apart=True),
    Scenario("manager", _save_managed, _held_managed, _managed_litter, numbered=True),
)

STOCK = Scenario("stock torch", _save_by_stock, _held_state, unnamed)
