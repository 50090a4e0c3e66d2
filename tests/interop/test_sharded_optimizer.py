"""FSDP1's optimizer state: ours gives what stock torch gives, from the same checkpoint."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch import nn
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

import dcp_plugins as dcp
from dcp_plugins.testing.ranks import run_ranks


def local_parts(value: Any) -> Any:
    """A state dict with each ShardedTensor as its shards' offsets and elements."""
    if isinstance(value, ShardedTensor):
        return [(tuple(shard.metadata.shard_offsets), shard.tensor.tolist()) for shard in value.local_shards()]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: local_parts(entry) for key, entry in value.items()}
    return value


def _stepped(seed: int) -> tuple[FullyShardedDataParallel, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), device_id=torch.device("cpu"), use_orig_params=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    return model, optimizer


def _fsdp_round_trip(folder: str) -> None:
    warnings.simplefilter("ignore")
    model, optimizer = _stepped(0)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        wanted = FullyShardedDataParallel.optim_state_dict(model, optimizer)
        dcp.save({"model": model.state_dict(), "optimizer": wanted}, checkpoint_id=folder)
    other, other_optimizer = _stepped(1)
    with FullyShardedDataParallel.state_dict_type(other, StateDictType.SHARDED_STATE_DICT):
        found, expected = (
            engine.load_sharded_optimizer_state_dict(
                other.state_dict(), optimizer_key="optimizer", storage_reader=engine.FileSystemReader(folder)
            )
            for engine in (dcp, stock)
        )
        assert local_parts(found) == local_parts(expected)
        flattened = FullyShardedDataParallel.optim_state_dict_to_load(other, other_optimizer, found["optimizer"])
        other_optimizer.load_state_dict(flattened)
        loaded = FullyShardedDataParallel.optim_state_dict(other, other_optimizer)
    assert local_parts(loaded["state"]) == local_parts(wanted["state"])
    assert loaded["param_groups"][0]["lr"] == 0.1


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_optimizer_of_fsdp_is_loaded_as_stock_torch_loads_it(tmp_path, world_size):
    run_ranks(world_size, _fsdp_round_trip, str(tmp_path / "c"))


def _sharded(spec_ranks: list[int], size: tuple[int, int], group: dist.ProcessGroup) -> ShardedTensor:
    spec = ChunkShardingSpec(dim=0, placements=[f"rank:{rank}/cpu" for rank in spec_ranks])
    return sharded_tensor.zeros(spec, *size, process_group=group)


def _over_tensor_parallelism(dp: int, tp: int) -> tuple[ShardedTensor, list[int]]:
    """A (16, 3) parameter, its rows cut over tensor parallelism first, and each part over FullyShardedDataParallel."""
    ranks = torch.arange(dp * tp).view(dp, tp)
    groups = {tuple(line): dist.new_group(line) for line in [*ranks.tolist(), *ranks.t().tolist()]}
    own_dp, own_tp = divmod(dist.get_rank(), tp)
    dp_ranks, tp_ranks = ranks[:, own_tp].tolist(), ranks[own_dp].tolist()
    outer = _sharded(tp_ranks, (16, 3), groups[tuple(tp_ranks)])
    (shard,) = outer.local_shards()
    shard.tensor = _sharded(dp_ranks, tuple(shard.tensor.shape), groups[tuple(dp_ranks)])  # type: ignore[arg-type]
    inner = shard.tensor.local_shards()[0].metadata.shard_offsets  # type: ignore[attr-defined]
    return outer, [shard.metadata.shard_offsets[0] + inner[0], 16 // tp // dp]


def _load_over_tensor_parallelism(folder: str, dp: int, tp: int) -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(3)
    moment = torch.randn(16, 3)
    state = {"state": {"w": {"exp_avg": moment, "step": torch.tensor(4.0)}, "bias": {"exp_avg": torch.arange(5.0)}}}
    dcp.save({"optimizer": state}, checkpoint_id=folder)
    weight, (start, rows) = _over_tensor_parallelism(dp, tp)
    model = {"w": weight, "bias": torch.zeros(5)}
    found = dcp.load_sharded_optimizer_state_dict(model, "optimizer", dcp.FileSystemReader(folder))
    own = found["optimizer"]["state"]["w"]["exp_avg"].local_shards()[0].tensor
    assert torch.equal(own, moment[start : start + rows])
    assert found["optimizer"]["state"]["w"]["step"] == 4.0
    if tp == 1:
        # Stock torch names ranks within FSDP's group, and so fails for any group but that of the first ranks.
        expected = stock.load_sharded_optimizer_state_dict(model, "optimizer", stock.FileSystemReader(folder))
        assert local_parts(found) == local_parts(expected)


@pytest.mark.parametrize(("dp", "tp"), [(2, 1), (2, 2)])
def test_over_tensor_parallelism_each_group_loads_its_own_part(tmp_path, dp, tp):
    run_ranks(dp * tp, _load_over_tensor_parallelism, str(tmp_path / "c"), dp, tp)


def _ask_for_an_unknown_key(folder: str) -> None:
    dcp.save({"optim": {"state": {"w": torch.rand(3)}}}, checkpoint_id=folder)
    with pytest.raises(ValueError, match="no key of the checkpoint begins with 'optimizer', found optim"):
        dcp.load_sharded_optimizer_state_dict({}, "optimizer", dcp.FileSystemReader(folder))


def test_an_unknown_optimizer_key_names_those_that_are_there(tmp_path):
    run_ranks(1, _ask_for_an_unknown_key, str(tmp_path / "c"))


def test_without_ranks_there_is_nothing_to_shard_over(tmp_path):
    with pytest.raises(ValueError, match="needs an initialised process group"):
        dcp.load_sharded_optimizer_state_dict({}, "optimizer", dcp.FileSystemReader(tmp_path))
