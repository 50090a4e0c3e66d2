"""Which file each tensor of a rank goes to, and what the file gets for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dcp_plugins.contract import SavePlanner, WriteItem, WriteItemType
from dcp_plugins.errors import PlanError, StorageWriteError
from dcp_plugins.format.safetensors_header import Placement, file_name
from dcp_plugins.geometry import Box, covers
from dcp_plugins.storage.planned import check_against_plan
from dcp_plugins.storage.safetensors_file import NewTensor, Piece, assembled

__all__ = ["RankFiles", "new_tensor", "placement", "split_by_file"]


@dataclass(frozen=True, slots=True)
class RankFiles(Mapping[str, Any]):
    """The coordinator's instructions to a rank about its files, sent as the plan's ``storage_data``.

    The mapping has the keys of torch's ``storage_data``, for a ``write_data`` that was written for torch's writer.
    """

    save_id: str
    num_files: int | None
    """The number of files of the whole save, over all ranks; None if no rank knows the others' numbers."""
    shard: int | None
    """Number of the rank, from 1; None where tensors are saved whole."""
    index_by_fqn: dict[str, int]
    """Number of the file, from 1, for each fqn of this rank; empty if all go to the first."""
    largest_index: int

    def __getitem__(self, key: str) -> Any:
        return self._as_torchs()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._as_torchs())

    def __len__(self) -> int:
        return len(self._as_torchs())

    def _as_torchs(self) -> dict[str, Any]:
        found: dict[str, Any] = {"fqn_to_index_mapping": self.index_by_fqn} if self.index_by_fqn else {}
        return found if self.shard is None else {**found, "shard_index": self.shard}

    def name(self, fqn: str, part: int) -> str:
        """Return the file for the ``part``-th chunk, from 1, of a tensor."""
        return file_name(self.index_by_fqn.get(fqn, 1), self.largest_index, shard=self.shard, part=part)


def split_by_file(items: list[WriteItem], own: RankFiles) -> dict[str, dict[str, list[WriteItem]]]:
    """Return, for each file of a rank, the items of each name in it.

    A file holds each name once. Of several chunks of one fqn each goes to a file of its own where shards are saved;
    otherwise they are put together, and are the whole tensor.
    """
    files: dict[str, dict[str, list[WriteItem]]] = {}
    seen: Counter[str] = Counter()
    for item in items:
        fqn = item.index.fqn
        seen[fqn] += 1
        part = seen[fqn] if own.shard is not None else 1
        files.setdefault(own.name(fqn, part), {}).setdefault(fqn, []).append(item)
    return files


def box_of_item(item: WriteItem) -> Box:
    assert item.tensor_data is not None
    return Box(tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes))


def placement(items: list[WriteItem]) -> Placement:
    """Return where the tensor that the file gets for ``items`` lies in the global one."""
    data = items[0].tensor_data
    assert data is not None
    whole = tuple(data.size)
    return Placement(box_of_item(items[0]).offsets if len(items) == 1 else (0,) * len(whole), whole)


def new_tensor(fqn: str, items: list[WriteItem], planner: SavePlanner) -> NewTensor:
    """Describe the tensor that a file gets for ``items``, which share its fqn."""
    data = items[0].tensor_data
    assert data is not None
    dtype = data.properties.dtype
    if len(items) == 1:
        return NewTensor(fqn, dtype, box_of_item(items[0]).sizes, lambda: _resolve(items[0], planner))
    shape = tuple(data.size)
    holes = covers([box_of_item(item) for item in items], Box((0,) * len(shape), shape))
    if holes:
        raise PlanError(
            f"{fqn}: this rank holds {len(items)} chunks which do not make up the tensor (missing: offsets "
            f"{holes[0].offsets} sizes {holes[0].sizes}): pass save_distributed=True to HuggingFaceStorageWriter"
        )

    def piece(item: WriteItem) -> Piece:
        tensor = _resolve(item, planner).detach()

        def fill(target: torch.Tensor, box: Box) -> None:
            target.copy_(tensor[box.slices()])

        return Piece(box_of_item(item), fill)

    return NewTensor(fqn, dtype, shape, lambda: assembled(shape, dtype, [piece(item) for item in items]))


def _resolve(item: WriteItem, planner: SavePlanner) -> torch.Tensor:
    value = planner.resolve_data(item)
    if not isinstance(value, torch.Tensor) or item.type is WriteItemType.BYTE_IO:
        raise StorageWriteError(f"{item.index.fqn}: the plan says tensor, the planner gave {type(value).__name__}")
    check_against_plan(item, value)
    return value
