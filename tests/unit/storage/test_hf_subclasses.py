"""Subclasses of the safetensors writer and reader, written as for torch's, work."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from safetensors.torch import save_file
from torch.distributed.checkpoint._hf_utils import _gen_file_name, _HFStorageInfo
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.futures import Future

import dcp_plugins as dcp
from dcp_plugins.contract import MetadataIndex, WriteResult
from dcp_plugins.errors import CheckpointException
from dcp_plugins.testing.ranks import run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


class OwnFiles:
    """Writes its files itself, under their final names, by what torch's writer puts into the plan."""

    path: Any

    def write_data(self, plan: Any, planner: Any) -> Future[list[WriteResult]]:
        mapping = plan.storage_data.get("fqn_to_index_mapping")
        shard = plan.storage_data.get("shard_index")
        files: dict[str, dict[str, torch.Tensor]] = {}
        results = []
        for item in plan.items:
            fqn = item.index.fqn
            number = 1 if mapping is None else mapping[fqn]
            name = _gen_file_name(number, 1 if mapping is None else max(mapping.values()), shard)
            tensor = planner.resolve_data(item).detach().contiguous()
            files.setdefault(name, {})[fqn] = tensor
            results.append(WriteResult(item.index, tensor.nbytes, _StorageInfo(name, 0, tensor.nbytes)))
        for name, tensors in files.items():
            save_file(tensors, os.path.join(self.path, name))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


class OurWriter(OwnFiles, dcp.HuggingFaceStorageWriter):
    pass


class TorchWriter(OwnFiles, stock.HuggingFaceStorageWriter):
    pass


def state() -> dict[str, Any]:
    return {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def blank() -> dict[str, Any]:
    return {key: torch.zeros_like(value) for key, value in state().items()}


def load(path: Path, reader: Any = dcp.HuggingFaceStorageReader) -> dict[str, Any]:
    target = blank()
    dcp.load(target, storage_reader=reader(path))
    return target


def assert_same(found: dict[str, Any]) -> None:
    assert found.keys() == state().keys()
    for key, value in state().items():
        assert torch.equal(found[key], value)


@pytest.mark.parametrize("mapping", [None, {"a": 1, "b": 2}], ids=["one file", "two files"])
def test_a_writer_that_writes_its_own_files_leaves_what_torchs_would(tmp_path: Path, mapping: Any) -> None:
    dcp.save(state(), storage_writer=OurWriter(tmp_path / "ours", mapping))
    stock.save(state(), storage_writer=TorchWriter(str(tmp_path / "theirs"), mapping))
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(tmp_path / "theirs"))
    index = "model.safetensors.index.json"
    ours, theirs = (json.loads((tmp_path / name / index).read_bytes()) for name in ("ours", "theirs"))
    assert ours["weight_map"] == theirs["weight_map"]
    assert_same(load(tmp_path / "ours"))


def test_a_writer_that_writes_its_own_files_replaces_a_checkpoint(tmp_path: Path) -> None:
    dcp.save(blank(), storage_writer=dcp.HuggingFaceStorageWriter(tmp_path))
    dcp.save(state(), storage_writer=OurWriter(tmp_path))
    assert_same(load(tmp_path))


def _save_shards(path: str) -> None:
    rank = dist.get_rank()
    mine = {key: value for number, (key, value) in enumerate(state().items()) if number == rank}
    dcp.save(mine, storage_writer=OurWriter(path, save_distributed=True))
    target = blank()
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(path))
    assert_same(target)


def test_each_rank_of_such_a_writer_writes_its_own_file(tmp_path: Path) -> None:
    run_ranks(2, _save_shards, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00002-model-00001-of-00001.safetensors",
    ]


class Forgetful(dcp.HuggingFaceStorageWriter):
    """Reports a file that it has not written."""

    def write_data(self, plan: Any, planner: Any) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(item.index, 4, _StorageInfo("model.safetensors", 0, 4)) for item in plan.items])
        return future


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_a_file_that_was_reported_and_not_written_is_named(tmp_path: Path, name: str) -> None:
    # A file of an earlier save does not pass for this one's.
    dcp.save(blank(), storage_writer=dcp.HuggingFaceStorageWriter(tmp_path))
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / name)
    with pytest.raises(CheckpointException, match=r"files that are not there: model\.safetensors"):
        dcp.save(state(), storage_writer=Forgetful(tmp_path))


class NamesOnly(dcp.HuggingFaceStorageReader):
    """Describes the files with torch's own class, which gives each chunk's file and not its place in the file."""

    whole_path = False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        metadata = super().read_metadata(*args, **kwargs)
        metadata.storage_data = {
            index: _HFStorageInfo(
                os.path.join(self.path, info.relative_path) if self.whole_path else info.relative_path,
                info.shape,
                info.dtype,
            )
            for index, info in metadata.storage_data.items()
        }
        return metadata


class WholePaths(NamesOnly):
    whole_path = True


@pytest.mark.parametrize("reader", [NamesOnly, WholePaths])
def test_a_reader_may_describe_files_with_torchs_class(tmp_path: Path, reader: Any) -> None:
    dcp.save(state(), storage_writer=dcp.HuggingFaceStorageWriter(tmp_path, {"a": 1, "b": 2}))
    assert_same(load(tmp_path, reader))
    whole = dcp.load_from_keys(storage_reader=reader(tmp_path))
    assert_same(whole)


class WrongFile(NamesOnly):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        metadata = super().read_metadata(*args, **kwargs)
        entry = metadata.storage_data[MetadataIndex("b", [0])]
        metadata.storage_data[MetadataIndex("a", [0, 0])].relative_path = entry.relative_path
        return metadata


def test_an_entry_that_names_the_wrong_file_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    dcp.save(state(), storage_writer=dcp.HuggingFaceStorageWriter(tmp_path, {"a": 1, "b": 2}))
    with pytest.raises(CheckpointException, match="has no tensor 'a'"):
        load(tmp_path, WrongFile)
