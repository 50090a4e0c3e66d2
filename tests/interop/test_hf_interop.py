"""Directories of safetensors files: one engine writes, the other reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import dcp_plugins as dcp
from dcp_plugins.testing.ranks import run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:torch.distributed is unavailable"),
]

ENGINES: dict[str, Any] = {"ours": dcp, "stock": stock}
PAIRS = [("ours", "stock"), ("stock", "ours"), ("ours", "ours")]
# What both the library and torch's writer know by name.
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.uint16,
]
INDEX = "model.safetensors.index.json"


def values() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    found = {
        str(dtype).removeprefix("torch."): (torch.randn(6, 5) * 20).abs().to(dtype)
        if dtype is not torch.bool
        else torch.rand(6, 5) > 0.5
        for dtype in DTYPES
    }
    return found | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "vector": torch.arange(11)}


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def assert_same(found: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tensor = found[name].full_tensor() if isinstance(found[name], DTensor) else found[name]
        assert (tensor.dtype, tensor.shape) == (value.dtype, value.shape), name
        assert bits(tensor) == bits(value), name


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(("saver", "loader"), PAIRS)
def test_whole_tensors_survive_in_one_process(tmp_path, saver, loader, mapped):
    state = values()
    mapping = {name: 1 + position % 3 for position, name in enumerate(state)} if mapped else None
    ENGINES[saver].save(dict(state), storage_writer=ENGINES[saver].HuggingFaceStorageWriter(str(tmp_path), mapping))
    target: dict[str, Any] = {name: torch.zeros_like(value) for name, value in state.items()}
    ENGINES[loader].load(target, storage_reader=ENGINES[loader].HuggingFaceStorageReader(str(tmp_path)))
    assert_same(target, state)


def test_both_engines_write_the_same_names_and_index(tmp_path):
    state = values()
    mapping = {name: 1 + position % 3 for position, name in enumerate(state)}
    listed, indices = [], []
    for name, engine in ENGINES.items():
        path = tmp_path / name
        engine.save(dict(state), storage_writer=engine.HuggingFaceStorageWriter(str(path), mapping))
        listed.append(sorted(file.name for file in path.iterdir()))
        indices.append(json.loads((path / INDEX).read_text()))
    assert listed[0] == listed[1]
    assert indices[0]["weight_map"] == indices[1]["weight_map"]
    assert indices[0]["metadata"]["total_size"] == indices[1]["metadata"]["total_size"]


def _sharded(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "rows": distribute_tensor(state["rows"], mesh, [Shard(0)]),
        "columns": distribute_tensor(state["columns"], mesh, [Shard(1)]),
        "copies": distribute_tensor(state["copies"], mesh, [Replicate()]),
        "plain": state["plain"].clone(),
    }


def _global() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {
        "rows": torch.randn(7, 3),
        "columns": torch.randn(4, 9).bfloat16(),
        "copies": torch.randn(5),
        "plain": torch.arange(4),
    }


def _save_sharded(engine: str, folder: str, options: dict[str, Any]) -> None:
    writer = ENGINES[engine].HuggingFaceStorageWriter(folder, save_distributed=True, **options)
    ENGINES[engine].save(_sharded(_global()), storage_writer=writer)


def _load_sharded(engine: str, folder: str) -> None:
    state = _global()
    target = _sharded({name: torch.zeros_like(value) for name, value in state.items()})
    ENGINES[engine].load(target, storage_reader=ENGINES[engine].HuggingFaceStorageReader(folder))
    assert_same(target, state)


def test_shards_of_two_ranks_load_with_either_engine_on_one_and_two(tmp_path):
    for saver in ENGINES:
        folder = str(tmp_path / saver)
        run_ranks(2, _save_sharded, saver, folder, {})
        names = sorted(path.name for path in Path(folder).iterdir())
        assert names == [f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)]
    for saver, loader in PAIRS:
        for world_size in (1, 2):
            run_ranks(world_size, _load_sharded, loader, str(tmp_path / saver))


def _consolidate_with_torch(source: str, output: str) -> None:
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    Path(output).mkdir()
    consolidate_safetensors_files(source, output, dict.fromkeys(("rows", "columns", "copies"), 1), num_threads=1)


def test_consolidated_files_hold_the_whole_tensors_for_the_library(tmp_path):
    mapping = {"rows": 1, "columns": 2, "copies": 2, "plain": 1}
    folder = str(tmp_path / "c")
    run_ranks(2, _save_sharded, "ours", folder, {"fqn_to_index_mapping": mapping, "enable_consolidation": True})
    state = _global()
    loaded = {}
    for name, index in json.loads((tmp_path / "c" / INDEX).read_text())["weight_map"].items():
        assert index == f"model-0000{mapping[name]}-of-00002.safetensors"
        loaded[name] = load_file(tmp_path / "c" / index)[name]
    assert_same(loaded, state)
    for engine in ENGINES:
        run_ranks(2, _load_sharded, engine, folder)
        run_ranks(1, _load_sharded, engine, folder + "/sharded")


def test_torchs_consolidation_takes_our_shards(tmp_path):
    run_ranks(2, _save_sharded, "ours", str(tmp_path / "c"), {})
    _consolidate_with_torch(str(tmp_path / "c"), str(tmp_path / "o"))
    state = _global()
    del state["plain"]
    assert_same(load_file(tmp_path / "o" / "model-00001-of-00001.safetensors"), state)


def _save_chunks(engine: str, folder: str) -> None:
    _, whole = _chunk_state()
    writer = ENGINES[engine].HuggingFaceStorageWriter(folder, save_distributed=True)
    ENGINES[engine].save({"w": _own_chunks(whole)}, storage_writer=writer)


def _chunk_state() -> tuple[torch.Tensor, torch.Tensor]:
    whole = torch.arange(32.0).view(8, 4)
    return torch.zeros_like(whole), whole


def _own_chunks(whole: torch.Tensor) -> torch.Tensor:
    """Every second pair of rows: two chunks on each of two ranks."""
    rank = dist.get_rank()
    starts = (2 * rank, 2 * rank + 4)
    local: Any = torch.cat([whole[start : start + 2] for start in starts])
    local.global_shape, local.global_offsets = (8, 4), tuple((start, 0) for start in starts)
    local.local_offsets, local.local_sizes = ((0, 0), (2, 0)), ((2, 4), (2, 4))
    return local  # type: ignore[no-any-return]


def test_stock_torch_reads_every_chunk_of_a_rank_that_has_several(tmp_path):
    # Known fault 5.
    run_ranks(2, _save_chunks, "ours", str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 4
    target, whole = _chunk_state()
    for engine in ENGINES.values():
        state: dict[str, Any] = {"w": target.clone()}
        engine.load(state, storage_reader=engine.HuggingFaceStorageReader(str(tmp_path)))
        assert torch.equal(state["w"], whole)


def _save_whole_on_all(folder: str) -> None:
    with pytest.raises(dcp.CheckpointException, match="save_distributed=True"):
        dcp.save(_sharded(_global()), storage_writer=dcp.HuggingFaceStorageWriter(folder))


def test_ranks_that_would_write_the_same_file_are_refused(tmp_path):
    run_ranks(2, _save_whole_on_all, str(tmp_path))


def _save_full_on_one(folder: str) -> None:
    state = _global() if dist.get_rank() == 0 else {}
    dcp.save(dict(state), storage_writer=dcp.HuggingFaceStorageWriter(folder + "/a"))
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    dcp.save(dict(_global()), storage_writer=dcp.HuggingFaceStorageWriter(folder + "/b"), planner=planner)


def test_one_rank_saves_the_full_state_dict_while_the_others_have_nothing_to_write(tmp_path):
    run_ranks(2, _save_full_on_one, str(tmp_path))
    for part in ("a", "b"):
        assert_same(load_file(tmp_path / part / "model-00001-of-00001.safetensors"), _global())
        assert len(json.loads((tmp_path / part / INDEX).read_text())["weight_map"]) == 4


def _save_without_collectives(folder: str) -> None:
    writer = dcp.HuggingFaceStorageWriter(folder, save_distributed=True)
    dcp.save(_sharded(_global()), storage_writer=writer, use_collectives=False)


def test_ranks_that_save_without_talking_make_one_checkpoint(tmp_path):
    run_ranks(2, _save_without_collectives, str(tmp_path))
    for engine in ENGINES:
        run_ranks(1, _load_sharded, engine, str(tmp_path))


def test_stock_torch_uses_our_reader_and_writer(tmp_path):
    state = values()
    stock.save(dict(state), storage_writer=dcp.HuggingFaceStorageWriter(tmp_path))
    target: dict[str, Any] = {name: torch.zeros_like(value) for name, value in state.items()}
    stock.load(target, storage_reader=dcp.HuggingFaceStorageReader(tmp_path))
    assert_same(target, state)


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16])
def test_both_readers_dequantise_to_the_same_bits(tmp_path, target_dtype):
    weight = torch.randn(300, 200).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2) * 3
    save_file({"l.weight": weight, "b": torch.rand(4)}, tmp_path / "one.safetensors")
    save_file({"l.weight_scale_inv": scale}, tmp_path / "two.safetensors")
    index = {"l.weight": "one.safetensors", "b": "one.safetensors", "l.weight_scale_inv": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    found = []
    for engine in ENGINES.values():
        state = {"l.weight": torch.zeros(300, 200, dtype=target_dtype), "b": torch.zeros(4)}
        reader = engine.QuantizedHuggingFaceStorageReader(str(tmp_path), target_dtype=target_dtype)
        engine.load(state, storage_reader=reader)
        found.append(state)
    assert_same(found[0], found[1])
    assert found[0]["l.weight"].any()
