from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointException, CheckpointNotFoundError, CorruptCheckpointError
from dcp_plugins.storage import arrays

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

INDEX = "model.safetensors.index.json"


def load(path: Path, target, **options):
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(path, **options))
    return target


def shard(path: Path, name: str, tensors, offsets) -> None:
    """Write a file as torch's writer does."""
    info = {key: {"saved_offsets": offset} for key, offset in offsets.items()}
    save_file(tensors, path / name, metadata={"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0"})


def test_a_plain_directory_of_the_library_needs_no_index(tmp_path):
    values = {"a": torch.rand(4, 5), "b": torch.rand(3).to(torch.float8_e4m3fn), "c": torch.tensor(True)}
    save_file({"a": values["a"]}, tmp_path / "one.safetensors")
    save_file({"b": values["b"], "c": values["c"]}, tmp_path / "two.safetensors")
    found = load(tmp_path, {key: torch.zeros_like(value) for key, value in values.items()})
    assert torch.equal(found["a"], values["a"])
    assert torch.equal(found["b"].view(torch.uint8), values["b"].view(torch.uint8))
    assert torch.equal(found["c"], values["c"])


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    save_file({"small": torch.rand(4), "huge": torch.rand(1_000_000)}, tmp_path / "x.safetensors")
    read = []
    preadv = os.preadv

    def counted(fd, buffers, position):
        done = preadv(fd, buffers, position)
        read.append(done)
        return done

    monkeypatch.setattr(arrays.os, "preadv", counted)
    load(tmp_path, {"small": torch.zeros(4)})
    assert sum(read) == 16


def test_neighbouring_tensors_share_a_system_call(tmp_path, monkeypatch):
    values = {f"t{number:04}": torch.rand(3) for number in range(500)}
    save_file(values, tmp_path / "x.safetensors")
    calls = []
    preadv = os.preadv
    monkeypatch.setattr(arrays.os, "preadv", lambda *args: calls.append(1) or preadv(*args))
    found = load(tmp_path, {key: torch.zeros(3) for key in values})
    assert all(torch.equal(found[key], value) for key, value in values.items())
    assert len(calls) == 1


def test_strided_and_differently_typed_targets_are_filled(tmp_path):
    values = {"a": torch.rand(40, 30), "b": torch.arange(6).view(2, 3), "f8": torch.rand(8, 4).to(torch.float8_e5m2)}
    save_file(values, tmp_path / "x.safetensors")
    target = {
        "a": torch.zeros(30, 40).t(),
        "b": torch.zeros(2, 3),
        "f8": torch.zeros(4, 8, dtype=torch.float8_e5m2).t(),
    }
    with pytest.warns(UserWarning, match=r"b \(torch.int64 -> torch.float32\)"):
        load(tmp_path, target)
    assert torch.equal(target["a"], values["a"])
    assert torch.equal(target["b"], values["b"].float())
    assert torch.equal(target["f8"].float(), values["f8"].float())


def test_shards_without_a_global_shape_make_up_the_tensor(tmp_path):
    whole = torch.rand(6, 4)
    shard(tmp_path, "shard-00001-x.safetensors", {"w": whole[:4, :2].contiguous()}, {"w": [0, 0]})
    shard(tmp_path, "shard-00002-x.safetensors", {"w": whole[4:].contiguous()}, {"w": [4, 0]})
    shard(tmp_path, "shard-00003-x.safetensors", {"w": whole[:4, 2:].contiguous()}, {"w": [0, 2]})
    assert torch.equal(load(tmp_path, {"w": torch.zeros(6, 4)})["w"], whole)
    assert torch.equal(load(tmp_path, {"w": torch.zeros(4, 6).t()})["w"], whole)


def test_a_missing_shard_is_noticed(tmp_path):
    whole = torch.rand(6, 4)
    shard(tmp_path, "a.safetensors", {"w": whole[:2].contiguous()}, {"w": [0, 0]})
    shard(tmp_path, "b.safetensors", {"w": whole[4:].contiguous()}, {"w": [4, 0]})
    with pytest.raises(CheckpointException, match="do not cover the tensor"):
        load(tmp_path, {"w": torch.zeros(6, 4)})
    dcp.save({"v": torch.rand(3)}, storage_writer=dcp.HuggingFaceStorageWriter(tmp_path / "ours"))
    with pytest.raises(CheckpointException, match="Missing key in checkpoint"):
        load(tmp_path / "ours", {"w": torch.zeros(3)})


def test_shards_that_disagree_are_refused(tmp_path):
    shard(tmp_path, "a.safetensors", {"w": torch.rand(2, 4)}, {"w": [0, 0]})
    shard(tmp_path, "b.safetensors", {"w": torch.rand(2, 4).half()}, {"w": [2, 0]})
    with pytest.raises(CorruptCheckpointError, match=r"b\.safetensors: w is part of.*do not belong together"):
        dcp.HuggingFaceStorageReader(tmp_path).read_metadata()


def test_of_two_files_with_one_tensor_the_index_decides_and_else_the_first(tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "a.safetensors")
    save_file({"w": torch.ones(3)}, tmp_path / "b.safetensors")
    assert torch.equal(load(tmp_path, {"w": torch.rand(3)})["w"], torch.zeros(3))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": "b.safetensors"}}))
    assert torch.equal(load(tmp_path, {"w": torch.rand(3)})["w"], torch.ones(3))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": "../../etc/passwd"}}))
    assert torch.equal(load(tmp_path, {"w": torch.rand(3)})["w"], torch.zeros(3))
    for content in ("[", "[]", '{"weight_map": []}', '{"weight_map": {"w": 1}}'):
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(CorruptCheckpointError, match="is not an index"):
            dcp.HuggingFaceStorageReader(tmp_path).read_metadata()


def test_a_directory_without_files_is_no_checkpoint(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointNotFoundError):
            dcp.HuggingFaceStorageReader(path).read_metadata()
        with pytest.raises(CheckpointException, match="CheckpointNotFoundError"):
            load(path, {"w": torch.zeros(1)})


def test_a_truncated_file_is_refused_before_anything_is_read(tmp_path):
    save_file({"w": torch.rand(100)}, tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 200)
    with pytest.raises(CheckpointException, match=r"x\.safetensors.*it was truncated"):
        load(tmp_path, {"w": torch.zeros(100)})


def test_a_directory_is_loaded_without_a_target_whole_and_by_keys(tmp_path):
    values = {"model.w": torch.rand(2, 3), "model.b": torch.rand(3).bfloat16(), "head": torch.rand(1)}
    save_file(values, tmp_path / "x.safetensors")
    reader = dcp.HuggingFaceStorageReader(tmp_path)
    found = dcp.load_from_keys(storage_reader=reader)
    assert found.keys() == values.keys()
    assert all(torch.equal(found[key], value) for key, value in values.items())
    assert dcp.load_from_keys("head", storage_reader=reader).keys() == {"head"}


def test_metadata_names_the_path_the_save_and_the_load(tmp_path):
    writer = dcp.HuggingFaceStorageWriter(tmp_path)
    dcp.save({"w": torch.rand(2)}, storage_writer=writer)
    reader = dcp.HuggingFaceStorageReader(tmp_path)
    meta = reader.read_metadata().storage_meta
    assert meta is not None
    assert (meta.checkpoint_id, meta.save_id, meta.load_id) == (tmp_path, writer.save_id, reader.load_id)


def test_a_planner_that_does_more_than_fill_views_is_asked_tensor_by_tensor(tmp_path):
    values = {"a": torch.rand(4), "b": torch.rand(4)}
    save_file(values, tmp_path / "x.safetensors")

    class Doubling(dcp.DefaultLoadPlanner):
        def resolve_tensor(self, read_item):
            return torch.empty(tuple(read_item.lengths))

        def commit_tensor(self, read_item, tensor):
            self.state_dict[read_item.dest_index.fqn].copy_(2 * tensor)

    target = {key: torch.zeros(4) for key in values}
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(tmp_path), planner=Doubling())
    assert all(torch.equal(target[key], 2 * value) for key, value in values.items())
