"""Ways to lay one global tensor out over ranks; each gives this rank's value, or its blank target, for it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharded_tensor.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.shard import Shard as LegacyShard
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from dcp_plugins.torch_versions import STRIDED_SHARD_IS_CUT_ONCE

# Divisible, not divisible, smaller than the mesh; one to three dimensions.
SHAPES = [(8, 6), (7, 5), (3, 2), (11,), (1, 4), (5, 3, 4)]

Layout = Callable[[torch.Tensor], Any]


def whole_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(math.prod(shape)).reshape(shape) + 1).to(dtype)


def rows_of(size: int, rank: int, parts: int) -> tuple[int, int]:
    """Return start and length of an uneven share: later ranks get more, the first may get nothing."""
    cuts = [size * (at * (at + 1)) // (parts * (parts + 1)) for at in range(parts + 1)]
    return cuts[rank], cuts[rank + 1] - cuts[rank]


def _distributed(mesh: DeviceMesh, placements: list[Placement]) -> Layout:
    # src_data_rank=None splits locally; with padding and a scatter, torch cannot shard unevenly twice.
    return lambda tensor: distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def dtensor_layouts() -> dict[str, Layout]:
    """Return the DTensor layouts that stock torch describes rightly, for shapes of any size."""
    world_size = dist.get_world_size()
    line = init_device_mesh("cpu", (world_size,))
    layouts: dict[str, Layout] = {
        "rows": _distributed(line, [Shard(0)]),
        "replicated": _distributed(line, [Replicate()]),
        "last dim": lambda tensor: distribute_tensor(tensor, line, [Shard(tensor.dim() - 1)], src_data_rank=None),
        "first rank only": _distributed(DeviceMesh("cpu", [0]), [Shard(0)]),
        "backwards": _distributed(DeviceMesh("cpu", list(range(world_size))[::-1]), [Shard(0)]),
    }
    if world_size % 2 == 0:
        grid = init_device_mesh("cpu", (2, world_size // 2))
        layouts["replicas of rows"] = _distributed(grid, [Replicate(), Shard(0)])
        layouts["rows of replicas"] = _distributed(grid, [Shard(0), Replicate()])
        layouts["rows twice"] = _distributed(grid, [Shard(0), Shard(0)])
        layouts["rows and last dim"] = lambda tensor: distribute_tensor(
            tensor, grid, [Shard(0), Shard(tensor.dim() - 1)], src_data_rank=None
        )
    return layouts


def strided_layouts() -> dict[str, Layout]:
    """Return DTensor layouts of which stock torch takes several boxes for one: only we can save or fill them."""
    world_size = dist.get_world_size()
    line = init_device_mesh("cpu", (world_size,))
    layouts: dict[str, Layout] = {
        "strided": _distributed(line, [_StridedShard(0, split_factor=2)]),
        "strided by three": lambda tensor: distribute_tensor(
            tensor, line, [_StridedShard(tensor.dim() - 1, split_factor=3)], src_data_rank=None
        ),
    }
    if world_size % 2 == 0:
        grid = init_device_mesh("cpu", (2, world_size // 2))
        if not STRIDED_SHARD_IS_CUT_ONCE:  # The sizes are uneven.
            layouts["strided then rows"] = _distributed(grid, [_StridedShard(0, split_factor=2), Shard(0)])
        layouts["rows then strided"] = _distributed(grid, [Shard(0), _StridedShard(0, split_factor=2)])
        layouts["strided and replicated"] = _distributed(grid, [_StridedShard(0, split_factor=3), Replicate()])
    return layouts


def legacy(tensor: torch.Tensor) -> Any:
    """Return a ShardedTensor of uneven rows; two shards on ranks that have more than one row."""
    start, length = rows_of(tensor.shape[0], dist.get_rank(), dist.get_world_size())
    pieces = [(start, length)] if length < 2 else [(start, 1), (start + 1, length - 1)]
    rest = [0] * (tensor.dim() - 1)
    shards = [
        LegacyShard(
            tensor[first : first + rows].clone(),
            ShardMetadata([first, *rest], [rows, *tensor.shape[1:]], f"rank:{dist.get_rank()}/cpu"),
        )
        for first, rows in pieces
        if rows
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sharded_tensor.init_from_local_shards(shards, *tensor.shape)


class HookedRows(torch.Tensor):
    """A tensor subclass with the three checkpoint hooks: some rows of a global tensor, cut in two boxes."""

    global_size: torch.Size
    boxes: list[tuple[int, int]]

    @classmethod
    def share_of(cls, tensor: torch.Tensor) -> HookedRows:
        start, length = rows_of(tensor.shape[0], dist.get_rank(), dist.get_world_size())
        made = tensor[start : start + length].clone().as_subclass(cls)
        made.global_size = tensor.shape
        made.boxes = [(start, length // 2), (start + length // 2, length - length // 2)]
        made.boxes = [(first, rows) for first, rows in made.boxes if rows]
        return made

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.global_size

    def size(self) -> torch.Size:  # type: ignore[override]
        return self.global_size

    def _chunks(self) -> list[ChunkStorageMetadata]:
        rest = self.global_size[1:]
        return [
            ChunkStorageMetadata(torch.Size([first, *[0] * len(rest)]), torch.Size([rows, *rest]))
            for first, rows in self.boxes
        ]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self.dtype), self.global_size),
            )
            for chunk in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self._chunks()

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        first = index.offset[0]
        (rows,) = [rows for start, rows in self.boxes if start == first]
        local = self.as_subclass(torch.Tensor)
        begin = first - self.boxes[0][0]
        return local[begin : begin + rows]


def checkpointable(tensor: torch.Tensor) -> torch.Tensor:
    """Return a plain local tensor with the attributes of ``CheckpointableTensor``: padding, then rows in two shards."""
    start, length = rows_of(tensor.shape[0], dist.get_rank(), dist.get_world_size())
    rest = tensor.shape[1:]
    local = torch.full((length + 1, *rest), -1, dtype=tensor.dtype)
    local[1:] = tensor[start : start + length]
    cuts = [(0, length // 2), (length // 2, length - length // 2)]
    held = [(at, rows) for at, rows in cuts if rows]
    zeros = (0,) * len(rest)
    local.global_shape = tuple(tensor.shape)  # type: ignore[attr-defined]
    local.global_offsets = tuple((start + at, *zeros) for at, _ in held)  # type: ignore[attr-defined]
    local.local_offsets = tuple((1 + at, *zeros) for at, _ in held)  # type: ignore[attr-defined]
    local.local_sizes = tuple((rows, *rest) for _, rows in held)  # type: ignore[attr-defined]
    return local


def shared_layouts() -> dict[str, Layout]:
    """Return the layouts that both engines understand."""
    return {
        **dtensor_layouts(),
        "plain": lambda tensor: tensor.clone(),
        "sharded_tensor": legacy,
        "hooks": HookedRows.share_of,
    }


def our_layouts() -> dict[str, Layout]:
    """Return the layouts that stock torch does not understand."""
    return {**strided_layouts(), "checkpointable": checkpointable}


def local_parts(value: Any) -> list[torch.Tensor]:
    """Return this rank's memory of a value."""
    if isinstance(value, DTensor):
        return [value.to_local()]
    if isinstance(value, sharded_tensor.ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    if isinstance(value, HookedRows):
        return [value.as_subclass(torch.Tensor)]
    return [value]
