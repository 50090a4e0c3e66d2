"""Readers, writers and planners written for torch work with our save and load, and ours with torch's."""

from __future__ import annotations

import dataclasses
import io
import pickle
import warnings
import zlib
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint._extension import ExtensionRegistry as StockExtensionRegistry
from torch.distributed.checkpoint._extension import StreamTransformExtension
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.futures import Future

import dcp_plugins as dcp
from dcp_plugins.storage import ExtensionRegistry
from dcp_plugins.testing.ranks import run_ranks
from tests.interop.values import assert_same, blank, patterned

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")


def _state() -> dict[str, Any]:
    whole = patterned(torch.float32, 13, 5)
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return {"model": {"w": distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)}, "b": whole[0], "n": 3}
    return {"model": {"w": whole}, "b": whole[0].clone(), "n": 3}


def _blank() -> dict[str, Any]:
    state = _state()
    for value in (state["model"]["w"], state["b"]):
        value.zero_()
    return {**state, "n": None}


def _local(state: dict[str, Any]) -> dict[str, Any]:
    w = state["model"]["w"]
    return {"w": w.to_local() if hasattr(w, "to_local") else w, "b": state["b"], "n": state["n"]}


def _round_trip(save: Any, load: Any, where: str = "") -> None:
    save(_state())
    target = _blank()
    load(target)
    assert_same(_local(target), _local(_state()), where)


class MemoryStore:
    """A third party's storage: one pickle for each item in a directory, written against torch's classes only."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)


class MemoryWriter(stock.StorageWriter):
    """Old in style: takes no rank, no collectives, and returns what only it understands."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.calls: list[str] = []

    def reset(self, checkpoint_id: Any = None) -> None:
        self.calls.append("reset")
        if checkpoint_id:
            self.folder = Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool) -> None:  # type: ignore[override]
        self.calls.append("set_up")

    def prepare_local_plan(self, plan: Any) -> Any:
        self.calls.append("local")
        self.folder.mkdir(parents=True, exist_ok=True)
        return plan

    def prepare_global_plan(self, plans: Any) -> Any:
        self.calls.append("global")
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: Any, planner: Any) -> Future[Any]:
        self.calls.append("write")
        results = []
        for at, item in enumerate(plan.items):
            data = planner.resolve_data(item)
            name = f"{plan.storage_data}-{at}"
            content = data.getvalue() if isinstance(data, io.BytesIO) else pickle.dumps(data.detach().clone())
            (self.folder / name).write_bytes(content)
            results.append(WriteResult(item.index, len(content), name))
        future: Future[Any] = Future()
        future.set_result({"opaque": results})
        return future

    def finish(self, metadata: Metadata, results: Any) -> None:
        self.calls.append("finish")
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part["opaque"]}
        (self.folder / "index").write_bytes(pickle.dumps(metadata))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class MemoryReader(stock.StorageReader):
    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def reset(self, checkpoint_id: Any = None) -> None:
        if checkpoint_id:
            self.folder = Path(checkpoint_id)

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        found = pickle.loads((self.folder / "index").read_bytes())
        assert isinstance(found, Metadata)
        return found

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:  # type: ignore[override]
        self.names = metadata.storage_data

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: Any) -> Any:
        return plans

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        for item in plan.items:
            content = (self.folder / self.names[item.storage_index]).read_bytes()
            if item.type is stock.planner.LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(content))
                continue
            tensor = pickle.loads(content)
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                tensor = tensor.narrow(dim, start, length)
            target = planner.resolve_tensor(item)
            target.detach().copy_(tensor)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _all_combinations(folder: str) -> None:
    """Every mixture of engine, storage and planner, each writing what another reads."""
    warnings.simplefilter("ignore")
    count = 0
    for engine in (dcp, stock):
        for writer in (dcp.FileSystemWriter, stock.FileSystemWriter, MemoryWriter):
            for planner in (dcp.DefaultSavePlanner, stock.DefaultSavePlanner):
                where = f"{folder}/{count}"
                engine.save(_state(), storage_writer=writer(where), planner=planner())  # type: ignore[attr-defined]
                count += 1
                if dist.is_initialized():
                    dist.barrier()
                readers = [MemoryReader] if writer is MemoryWriter else [dcp.FileSystemReader, stock.FileSystemReader]
                for reader in readers:
                    for load_planner in (dcp.DefaultLoadPlanner, stock.DefaultLoadPlanner):
                        for loader in (dcp, stock):
                            target = _blank()
                            loader.load(  # type: ignore[attr-defined]
                                target, storage_reader=reader(where), planner=load_planner()
                            )
                            text = f"{engine} {writer} {planner} -> {loader} {reader} {load_planner}"
                            assert_same(_local(target), _local(_state()), text)


def test_engines_storages_and_planners_of_either_side_combine_in_one_process(tmp_path):
    with warnings.catch_warnings():
        _all_combinations(str(tmp_path))


def test_engines_storages_and_planners_of_either_side_combine_on_two_ranks(tmp_path):
    run_ranks(2, _all_combinations, str(tmp_path))


def test_a_writer_is_called_in_torchs_order_and_its_results_are_its_own(tmp_path):
    writer = MemoryWriter(str(tmp_path / "unused"))
    dcp.save(_state(), checkpoint_id=tmp_path / "c", storage_writer=writer)
    assert writer.calls == ["reset", "set_up", "local", "global", "write", "finish"]
    assert (tmp_path / "c" / "index").exists()
    assert not (tmp_path / "unused").exists()


class OldSavePlanner(stock.DefaultSavePlanner):
    def set_up_planner(self, state_dict: Any, is_coordinator: bool) -> None:  # type: ignore[override]
        super().set_up_planner(state_dict, is_coordinator=is_coordinator)


def test_a_planner_of_the_old_signature_works_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="storage_meta"):
        dcp.save(_state(), checkpoint_id=tmp_path, planner=OldSavePlanner())
    target = _blank()
    dcp.load(target, checkpoint_id=tmp_path)
    assert_same(_local(target), _local(_state()))


class RenamingSavePlanner(dcp.DefaultSavePlanner):
    """The example of torch's documentation: a prefix for every key."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        super().set_up_planner({"prefix": state_dict}, storage_meta, is_coordinator)


class RenamingLoadPlanner(dcp.DefaultLoadPlanner):
    """The reverse: keys of the checkpoint carry a prefix that the state dict's do not."""

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.state_dict = {f"prefix.{key}": value for key, value in self.state_dict.items()}
        self.mappings = {f"prefix.{key}": path for key, path in self.mappings.items()}

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        super().load_bytes(read_item, value)


class HalfSavePlanner(dcp.DefaultSavePlanner):
    """The example of torch's documentation: everything in half precision."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None:
                item.tensor_data.properties.dtype = torch.float16
        return plan

    def resolve_data(self, write_item: Any) -> Any:
        item = super().resolve_data(write_item)
        return item if isinstance(item, io.BytesIO) else item.half()


class WrongSavePlanner(dcp.DefaultSavePlanner):
    """Forgets to say in the plan what it does to the data."""

    def resolve_data(self, write_item: Any) -> Any:
        item = super().resolve_data(write_item)
        return item if isinstance(item, io.BytesIO) else item.half()


class CountingLoadPlanner(dcp.DefaultLoadPlanner):
    """Loads through a copy, and so depends on commit_tensor being called after the read."""

    def __init__(self) -> None:
        super().__init__()
        self.committed: list[str] = []

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        return super().resolve_tensor(read_item).clone()

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        self.committed.append(read_item.dest_index.fqn)
        super().resolve_tensor(read_item).copy_(tensor * 2)


class DoublingLoadPlanner(dcp.DefaultLoadPlanner):
    def lookup_tensor(self, index: Any) -> torch.Tensor:
        return super().lookup_tensor(index)

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        loaded = torch.load(value, weights_only=True)
        self.original_state_dict[read_item.dest_index.fqn] = loaded * 2


class AnnotatingSavePlanner(dcp.DefaultSavePlanner):
    """Keeps data of its own in the metadata, as torch's documentation suggests."""

    def create_local_plan(self) -> Any:
        return dataclasses.replace(super().create_local_plan(), planner_data={"rank's": "data"})

    def create_global_plan(self, all_plans: Any) -> Any:
        plans, metadata = dcp.plan.create_default_global_save_plan(all_plans)  # type: ignore[attr-defined]
        collected = [plan.planner_data for plan in all_plans]
        return plans, dataclasses.replace(metadata, planner_data=collected)


def test_a_planner_may_rename_keys_both_ways(tmp_path):
    dcp.save(_state(), checkpoint_id=tmp_path, planner=RenamingSavePlanner())
    assert set(dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata) == {
        "prefix.model.w",
        "prefix.b",
        "prefix.n",
    }
    target = {"prefix": _blank()}
    dcp.load(target, checkpoint_id=tmp_path)
    assert_same(target["prefix"], _state())
    bare = _blank()
    dcp.load(bare, checkpoint_id=tmp_path, planner=RenamingLoadPlanner())
    assert_same(bare, _state())


def test_a_planner_may_change_dtypes_if_it_says_so_in_the_plan(tmp_path):
    state = {"w": torch.arange(4.0), "n": 1}
    dcp.save(state, checkpoint_id=tmp_path / "c", planner=HalfSavePlanner())
    for engine in (dcp, stock):
        target = {"w": torch.zeros(4, dtype=torch.float16), "n": 0}
        engine.load(target, checkpoint_id=tmp_path / "c")  # type: ignore[attr-defined]
        assert torch.equal(target["w"], state["w"].half())  # type: ignore[arg-type, union-attr]
    with pytest.raises(dcp.CheckpointException, match=r"w: the plan says.*float32.*resolve_data gave.*float16"):
        dcp.save(state, checkpoint_id=tmp_path / "wrong", planner=WrongSavePlanner())
    assert not (tmp_path / "wrong" / ".metadata").exists()


def test_a_planner_may_load_through_copies_of_its_own(tmp_path):
    dcp.save({"a": torch.ones(3), "b": [torch.ones(2)], "n": 4}, checkpoint_id=tmp_path)
    planner = CountingLoadPlanner()
    target: dict[str, Any] = {"a": torch.zeros(3), "b": [torch.zeros(2)], "n": 0}
    dcp.load(target, checkpoint_id=tmp_path, planner=planner)
    assert target["a"].tolist() == [2, 2, 2]
    assert target["b"][0].tolist() == [2, 2]
    assert sorted(planner.committed) == ["a", "b.0"]
    dcp.load(target, checkpoint_id=tmp_path, planner=DoublingLoadPlanner())
    assert target["n"] == 8
    assert target["a"].tolist() == [1, 1, 1]


def test_a_planners_own_data_is_kept_in_the_metadata(tmp_path):
    import dcp_plugins.plan  # noqa: F401 (used through dcp)

    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path, planner=AnnotatingSavePlanner(flatten_state_dict=False))
    assert dcp.FileSystemReader(tmp_path).read_metadata().planner_data == [{"rank's": "data"}]
    target = {"w": torch.zeros(2)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target["w"].sum() == 2


class ByKeyLoadPlanner(dcp.DefaultLoadPlanner):
    """Reads a part of the checkpoint only: filters the local plan."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        return dataclasses.replace(plan, items=[item for item in plan.items if item.dest_index.fqn == "a"])


def test_a_planner_may_drop_items_of_its_plan(tmp_path):
    dcp.save({"a": torch.ones(2), "b": torch.ones(2)}, checkpoint_id=tmp_path)
    target = {"a": torch.zeros(2), "b": torch.zeros(2)}
    dcp.load(target, checkpoint_id=tmp_path, planner=ByKeyLoadPlanner())
    assert target["a"].sum() == 2
    assert not target["b"].any()


def _plans_are_torchs(folder: str) -> None:
    """The plans that hooks see are the same as torch's: replicas in every local plan, once in the global ones."""
    seen: dict[str, Any] = {}

    def spying(base: Any, name: str) -> Any:
        class Spy(base):
            def create_global_plan(self, all_plans: Any) -> Any:
                plans, metadata = super().create_global_plan(all_plans)
                key = [[(item.index.fqn, item.type.name) for item in plan.items] for plan in all_plans]
                seen[name] = (key, [sorted(i.index.fqn for i in plan.items) for plan in plans], plans, metadata)
                return plans, metadata

        return Spy

    for name, engine in (("ours", dcp), ("stock", stock)):
        planner = spying(engine.DefaultSavePlanner, name)()  # type: ignore[attr-defined]
        engine.save(_state(), checkpoint_id=f"{folder}/{name}", planner=planner)  # type: ignore[attr-defined]
    if dist.get_rank() == 0:
        ours, theirs = seen["ours"], seen["stock"]
        assert sorted(map(sorted, ours[0])) == sorted(map(sorted, theirs[0]))
        written = [fqn for plan in ours[1] for fqn in plan]
        assert sorted(written) == sorted(fqn for plan in theirs[1] for fqn in plan)
        assert written.count("b") == written.count("n") == 1
        for plan in ours[2]:
            for item in plan.items:
                if item.tensor_data is not None:
                    chunk = ours[3].state_dict_metadata[item.index.fqn].chunks[item.index.index]
                    assert chunk.offsets == item.index.offset


def test_global_planning_sees_and_returns_what_torchs_does(tmp_path):
    run_ranks(2, _plans_are_torchs, str(tmp_path))


class Deflate(StreamTransformExtension):
    """A stream transform in a few lines, against torch's interface."""

    @staticmethod
    def registry_name() -> str:
        return "stream.test-deflate"

    @staticmethod
    def from_descriptor(version: str) -> Deflate:
        assert version == "1"
        return Deflate()

    def get_descriptor(self) -> str:
        return f"{self.registry_name()}/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        return _Deflating(output)  # type: ignore[return-value]

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        return io.BytesIO(zlib.decompress(input.read()))


class _Deflating(io.RawIOBase):
    def __init__(self, output: IO[bytes]) -> None:
        self._output = output
        self._deflate = zlib.compressobj()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._output.write(self._deflate.compress(data))
        return len(memoryview(data).cast("B"))

    def flush(self) -> None:
        """Nothing to do before the end."""

    def close(self) -> None:
        if not self.closed:
            self._output.write(self._deflate.flush())
            super().close()


class Flip(Deflate):
    """A transform that is its own inverse, to see in which order several are applied."""

    @staticmethod
    def registry_name() -> str:
        return "stream.test-flip"

    @staticmethod
    def from_descriptor(version: str) -> Flip:
        return Flip()

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        return _Flipping(output)  # type: ignore[return-value]

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        return io.BytesIO(bytes(byte ^ 255 for byte in input.read()))


class _Flipping(_Deflating):
    def write(self, data: Any) -> int:
        content = bytes(memoryview(data).cast("B"))
        self._output.write(bytes(byte ^ 255 for byte in content))
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._output.close()
            io.RawIOBase.close(self)


def _registry(kind: Any) -> Any:
    registry = kind()
    for extension in (Deflate, Flip):
        registry.register(extension)
    return registry


@pytest.mark.parametrize("extensions", [[Deflate()], [Flip(), Deflate()]], ids=["one", "two"])
def test_stream_transforms_are_applied_recorded_and_undone_by_both_engines(tmp_path, extensions):
    state = {"w": torch.zeros(100, 100), "t": patterned(torch.float32, 6, 4).t(), "e": torch.empty(0), "n": ["x"] * 99}
    state["conj"] = torch.ones(3, dtype=torch.complex64).conj()
    sides: list[Any] = [(dcp, ExtensionRegistry), (stock, StockExtensionRegistry)]
    for saver, _ in sides:
        if saver is stock and len(extensions) > 1:
            # Torch lists its transforms in the wrong order and cannot read them back itself.
            continue
        folder = tmp_path / saver.__name__
        saver.save(state, storage_writer=saver.FileSystemWriter(folder, _extensions=extensions))
        metadata = dcp.FileSystemReader(folder).read_metadata()
        recorded = {tuple(info.transform_descriptors) for info in metadata.storage_data.values()}
        assert recorded == {tuple(extension.get_descriptor() for extension in extensions)}
        assert sum(path.stat().st_size for path in folder.glob("*.distcp")) < 10_000
        for loader, registry in sides:
            target = blank(state)
            loader.load(target, storage_reader=loader.FileSystemReader(folder, _registry(registry)))
            assert_same(target, state, f"{saver} -> {loader}")
        part = {"w": torch.ones(100, 100)}
        with pytest.raises(dcp.CheckpointException, match="unknown extension 'stream.test-"):
            dcp.load(part, checkpoint_id=folder)


def test_metadata_of_old_torch_still_loads(tmp_path):
    """Without the newer fields, and with the tensor properties of ShardedTensor."""
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldProperties

    stock.save({"w": torch.arange(4.0), "n": 5}, checkpoint_id=tmp_path)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["w"]
    assert isinstance(entry, TensorStorageMetadata)
    assert isinstance(metadata.state_dict_metadata["n"], BytesStorageMetadata)
    entry.properties = OldProperties(dtype=torch.float32)  # type: ignore[assignment]
    for name in ("version", "storage_meta"):
        metadata.__dict__.pop(name, None)
    for info in metadata.storage_data.values():
        info.__dict__.pop("transform_descriptors", None)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    target = {"w": torch.zeros(4), "n": 0}
    dcp.load(target, checkpoint_id=tmp_path)
    assert_same(target, {"w": torch.arange(4.0), "n": 5})
    assert_same(dcp.load_from_keys(checkpoint_id=tmp_path), {"w": torch.arange(4.0), "n": 5})
