"""Damage in safetensors files that this package wrote is found; files of other writers load as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import dcp_plugins as dcp
from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.format.safetensors_header import dtype_name
from dcp_plugins.storage.safetensors_file import read_header
from dcp_plugins.testing.ranks import run_ranks
from tests.interop.values import assert_same, blank

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:torch.distributed is unavailable"),
]

DTYPES = [dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype) and dtype_name(dtype)]
# A large tensor takes several system calls, a wide one rows that are larger than the blocks of an indirect read.
LARGE = {"rows": (700_000, 1), "wide": (2, 1_200_000)}


def save(state: dict[str, Any], folder: Path, **options: Any) -> Path:
    """Save, and return the file of the largest name."""
    dcp.save(dict(state), storage_writer=dcp.HuggingFaceStorageWriter(folder, **options))
    return max(folder.glob("*.safetensors"))


def load(target: dict[str, Any], folder: Path, **options: Any) -> dict[str, Any]:
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(folder, **options))
    return target


def flip(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as stream:
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ 1 << bit]))


def raw(dtype: torch.dtype) -> torch.Tensor:
    """A tensor of 32 bytes, each of which a flip of its lowest bit leaves a value of the dtype."""
    pattern = torch.tensor([0, 1] * 16) if dtype is torch.bool else torch.arange(32) * 7
    return pattern.to(torch.uint8).view(dtype)


def part_of(shape: tuple[int, int], first_row: int, num_rows: int) -> Any:
    """Zeros for some rows of a tensor of float32."""
    target: Any = torch.zeros(num_rows, shape[1])
    target.global_shape, target.global_offsets = shape, ((first_row, 0),)
    target.local_offsets, target.local_sizes = ((0, 0),), (tuple(target.shape),)
    return target


def test_a_flipped_bit_in_a_tensor_of_any_dtype_is_found_and_the_message_says_where(tmp_path):
    state = {str(dtype): raw(dtype) for dtype in DTYPES}
    path = save(state, tmp_path)
    assert_same(load(blank(state), tmp_path), state)
    header = read_header(path)
    for number, (name, entry) in enumerate(header.tensors.items()):
        for position in (entry.start, (entry.start + entry.end) // 2, entry.end - 1):
            bit = 0 if entry.dtype is torch.bool else number % 8
            flip(path, position, bit)
            where = rf"{path.name} \({name}\): expected data with CRC-32 {header.checksums[name]:08x}, found [0-9a-f]"
            with pytest.raises(dcp.CheckpointException, match=f"{where}.*restore it or load another checkpoint"):
                load({name: torch.zeros_like(state[name])}, tmp_path)
            flip(path, position, bit)


def test_a_flipped_bit_in_the_header_is_found_or_changes_nothing(tmp_path):
    state = {"layer.1": torch.rand(2, 3), "layer.2": torch.rand(2, 3), "step": torch.tensor(3)}
    path = save(state, tmp_path)
    content = path.read_bytes()
    unnoticed = set()
    for position in range(read_header(path).data_start):
        flip(path, position, position % 8)
        try:
            dcp.HuggingFaceStorageReader(tmp_path).read_metadata()
        except CorruptCheckpointError:
            pass
        else:
            assert_same(load(blank(state), tmp_path), state)
            unnoticed.add(position)
        flip(path, position, position % 8)
    # Where the name of the attribute is damaged, there seem to be no checksums; everything else is covered by them.
    name = content.index(b"DCP_CRC32")
    assert unnoticed <= set(range(name, name + len("DCP_CRC32")))
    assert_same(load(blank(state), tmp_path), state)


class OneByOne(dcp.DefaultLoadPlanner):
    """Fills the state dict from tensors of its own, and so is asked for each of them."""

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        return torch.empty(tuple(read_item.lengths))

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        self.state_dict[read_item.dest_index.fqn].copy_(tensor)


@pytest.mark.filterwarnings("ignore:.*torch.float32 -> torch.float64")
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_damage_is_found_however_a_large_tensor_is_read_whole(tmp_path, shape):
    value = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    path = save({"before": torch.ones(3), "w": value, "z": torch.ones(3)}, tmp_path)
    entry = read_header(path).tensors["w"]
    ways: dict[str, Callable[..., Any]] = {
        "direct": lambda **options: load({"w": torch.zeros(shape), "z": torch.zeros(3)}, tmp_path, **options),
        "strided": lambda **options: load({"w": torch.zeros(*shape, 2)[..., 0]}, tmp_path, **options),
        "converted": lambda **options: load({"w": torch.zeros(shape, dtype=torch.float64)}, tmp_path, **options),
        "one by one": lambda **options: dcp.load(
            {"w": torch.zeros(shape)},
            storage_reader=dcp.HuggingFaceStorageReader(tmp_path, **options),
            planner=OneByOne(),
        ),
        "by keys": lambda **options: dcp.load_from_keys(
            "w", storage_reader=dcp.HuggingFaceStorageReader(tmp_path, **options)
        ),
    }
    for position in (entry.start, entry.end - 1):
        flip(path, position)
        for way in ways.values():
            with pytest.raises(dcp.CheckpointException, match=r"\(w\): expected data with CRC-32"):
                way()
            way(verify_checksums=False)
        flip(path, position)
        for way in ways.values():
            way()


def test_a_part_of_a_tensor_is_read_from_a_file_whose_damage_is_elsewhere(tmp_path):
    value = torch.rand(8, 4)
    path = save({"w": value, "v": torch.ones(2)}, tmp_path)
    flip(path, read_header(path).tensors["w"].end - 1)
    for target, rows in ((part_of((8, 4), 0, 6), slice(6)), (part_of((8, 4), 3, 2), slice(3, 5))):
        assert torch.equal(load({"w": target}, tmp_path)["w"], value[rows])
    assert load({"v": torch.zeros(2)}, tmp_path)["v"].tolist() == [1.0, 1.0]


def test_damage_in_any_of_several_files_is_found_and_that_file_is_named(tmp_path):
    state = {name: torch.rand(5) for name in "abc"}
    save(state, tmp_path, fqn_to_index_mapping={"a": 1, "b": 2, "c": 3})
    for number, name in enumerate(state, start=1):
        path = tmp_path / f"model-0000{number}-of-00003.safetensors"
        position = read_header(path).tensors[name].start
        flip(path, position)
        with pytest.raises(dcp.CheckpointException, match=rf"{path.name} \({name}\): expected data"):
            load(blank(state), tmp_path)
        flip(path, position)


def _state() -> dict[str, torch.Tensor]:
    return {"rows": torch.arange(24.0).view(6, 4), "columns": torch.arange(40, dtype=torch.int32).view(4, 10)}


def _sharded(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(state[name], mesh, [Shard(dim)]) for dim, name in enumerate(("rows", "columns"))}


def _save_sharded_and_damage(folder: Path) -> None:
    save(_sharded(_state()), folder, save_distributed=True, enable_consolidation=True)
    dist.barrier()
    load(_sharded(blank(_state())), folder / "sharded")
    dist.barrier()
    path = folder / "sharded" / "shard-00002-model-00001-of-00001.safetensors"
    if dist.get_rank() == 0:
        flip(path, read_header(path).tensors["columns"].start)
    dist.barrier()
    with pytest.raises(dcp.CheckpointException, match=rf"{path.name} \(columns\): expected data with CRC-32") as caught:
        load(_sharded(blank(_state())), folder / "sharded")
    assert caught.value.failures.keys() == {1}


def test_damage_in_a_shard_is_found_by_the_rank_that_reads_it_and_in_the_consolidated_file_by_all(tmp_path):
    run_ranks(2, _save_sharded_and_damage, tmp_path)
    with pytest.raises(dcp.CheckpointException, match=r"shard-00002.*\(columns\): expected data with CRC-32"):
        load(blank(_state()), tmp_path / "sharded")
    assert_same(load(blank(_state()), tmp_path), _state())
    path = tmp_path / "model-00001-of-00001.safetensors"
    flip(path, read_header(path).tensors["rows"].start)
    with pytest.raises(dcp.CheckpointException, match=rf"{path.name} \(rows\): expected data with CRC-32"):
        load(blank(_state()), tmp_path)


def test_damage_in_a_quantised_weight_or_its_scales_is_found(tmp_path):
    scaled = {"w": torch.ones(1500, 2000).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(12, 16)}
    packed = {
        "e_blocks": torch.ones(2, 9_000, 4, 16, dtype=torch.uint8),
        "e_scales": torch.full((2, 9_000, 4), 127, dtype=torch.uint8),
    }
    path = save(scaled | packed, tmp_path)

    def dequantized(**options: Any) -> None:
        target = {"w": torch.zeros(1500, 2000), "e_blocks": torch.zeros(2, 9_000, 128)}
        dcp.load(target, storage_reader=dcp.QuantizedHuggingFaceStorageReader(tmp_path, **options))

    dequantized()
    for name, entry in read_header(path).tensors.items():
        flip(path, entry.end - 1)
        with pytest.raises(dcp.CheckpointException, match=rf"\({name}\): expected data with CRC-32"):
            dequantized()
        flip(path, entry.end - 1)
    flip(path, read_header(path).tensors["w"].start)
    dequantized(verify_checksums=False)


def test_a_file_of_another_program_that_copies_our_attributes_loads_without_checksums(tmp_path):
    path = save({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "ours")
    with safe_open(path, "pt") as file:
        attributes = file.metadata()
    assert "DCP_CRC32" in attributes
    changed = {"a": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(1)}
    (tmp_path / "theirs").mkdir()
    save_file(changed, tmp_path / "theirs" / "x.safetensors", {**attributes, "DCP_SHARDING_INFO": ""})
    assert_same(load({name: torch.ones_like(value) for name, value in changed.items()}, tmp_path / "theirs"), changed)
