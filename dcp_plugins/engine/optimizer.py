"""FSDP1's optimizer state, loaded in the layout of the model's own state dict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dcp_plugins.contract import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    StorageReader,
    TensorProperties,
    TensorStorageMetadata,
)
from dcp_plugins.coord import Ranks
from dcp_plugins.engine.load import run_load
from dcp_plugins.engine.setup import Opening
from dcp_plugins.errors import PlanError, UnsupportedValueError, listing
from dcp_plugins.plan import (
    DefaultLoadPlanner,
    create_default_local_load_plan,
    create_read_items_for_chunk_list,
    unflatten_state_dict,
)
from dcp_plugins.torch_private import ChunkShardingSpec, LocalShard, ShardedTensor, ShardedTensorProperties

__all__ = ["load_sharded_optimizer_state_dict"]


def load_sharded_optimizer_state_dict(
    model_state_dict: dict[str, Any],
    optimizer_key: str,
    storage_reader: StorageReader,
    planner: LoadPlanner | None = None,
) -> dict[str, Any]:
    """Return the optimizer state that was saved under ``optimizer_key``, each tensor sharded over the ranks.

    For ``FSDP.optim_state_dict_to_load``. There is no state dict to fill, because an optimizer that has not stepped
    has no state: the checkpoint says what there is. A tensor of one element comes whole, any other as a
    ``ShardedTensor`` cut along its first dimension. Every rank of the default group must call this.

    Args:
        model_state_dict: FSDP's sharded state dict of the model. Where FSDP runs over tensor parallelism, its nested
            ``ShardedTensor`` say which part of each tensor this rank's FSDP group holds.
        optimizer_key: First element of the optimizer's keys in the checkpoint.
        storage_reader: Reads the checkpoint.
        planner: Plans the load; None takes ``DefaultLoadPlanner``. Not used over tensor parallelism, as in torch.

    Returns:
        The nested state dict, ``{optimizer_key: ...}``.

    Raises:
        CheckpointException: Some rank failed; raised on every rank.
    """
    if not dist.is_initialized():
        raise ValueError(
            "load_sharded_optimizer_state_dict needs an initialised process group: it shards over its ranks"
        )
    ranks = Ranks(None, distributed=True)
    # In an exchange: a rank that fails alone to read the metadata would be missing when the others agree on plans.
    describing = Opening(lambda: _describe(model_state_dict, optimizer_key, storage_reader, planner))
    with describing.unwrapped():
        flat, paths, own_planner = ranks.settle("describe", describing)
    run_load(lambda: flat, lambda: storage_reader, own_planner, ranks, is_last=True)
    return unflatten_state_dict(flat, dict(paths))


def _describe(
    model_state_dict: dict[str, Any], optimizer_key: str, storage_reader: StorageReader, planner: LoadPlanner | None
) -> tuple[dict[str, Any], Mapping[str, tuple[str | int, ...]], LoadPlanner]:
    """Return empty tensors for the optimizer's keys in the checkpoint, the paths of the keys, and the planner."""
    metadata = storage_reader.read_metadata()
    paths: Mapping[str, tuple[str | int, ...]] = metadata.planner_data or {}
    parts, group = _parts_by_fqn(model_state_dict)
    spec = _spec_over(group)
    flat: dict[str, Any] = {}
    offsets: dict[str, tuple[int, ...]] = {}
    for key, entry in metadata.state_dict_metadata.items():
        path = paths.get(key, ())
        if not path or path[0] != optimizer_key:
            continue
        if isinstance(entry, BytesStorageMetadata):
            # Replaced by the load.
            flat[key] = None
            continue
        if entry.size.numel() == 1:
            flat[key] = _empty(entry.properties, entry.size, _device_of(group))
            continue
        size = entry.size
        # {optimizer_key: {"state": {fqn: {name: tensor}}}}
        part = parts.get(str(path[2])) if group is not None and len(path) > 2 else None
        if part is not None:
            size = torch.Size(part.sizes)
            if part.is_nested:
                offsets[key] = tuple(part.offsets)
        flat[key] = _sharded(spec, size, entry.properties, group)
    if not flat:
        first = {path[0] for path in paths.values()}
        raise PlanError(f"no key of the checkpoint begins with {optimizer_key!r}, found {listing(first) or 'no paths'}")
    storage_reader.reset()
    return flat, paths, planner or DefaultLoadPlanner() if group is None else _PartLoadPlanner(offsets)


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """The box of a parameter that this rank's FSDP group holds, in elements of the whole parameter."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    is_nested: bool


def _parts_by_fqn(model_state_dict: Mapping[str, Any]) -> tuple[dict[str, _Part], dist.ProcessGroup | None]:
    """Return each parameter's part, and FSDP's group if it runs over tensor parallelism."""
    parts: dict[str, _Part] = {}
    group: dist.ProcessGroup | None = None
    problems = []
    for fqn, value in model_state_dict.items():
        size = tuple(value.size())
        parts[fqn] = _Part((0,) * len(size), size, is_nested=False)
        inner = value._local_tensor if type(value) is DTensor else None
        shards = value.local_shards() if type(value) is ShardedTensor else []
        if isinstance(inner, (DTensor, ShardedTensor)) or any(type(shard.tensor) is DTensor for shard in shards):
            problems.append(fqn)
        elif any(type(shard.tensor) is ShardedTensor for shard in shards):
            if len(shards) != 1:
                problems.append(fqn)
                continue
            place = shards[0].metadata
            parts[fqn] = _Part(tuple(place.shard_offsets), tuple(place.shard_sizes), is_nested=True)
            nested: Any = shards[0].tensor
            # ShardedTensor has no public accessor for it.
            group = nested._process_group
    if problems:
        raise UnsupportedValueError(
            "expected plain tensors, ShardedTensors, or ShardedTensors with one ShardedTensor on this rank, found "
            f"other nesting at {listing(problems)}: use get_optimizer_state_dict and load instead"
        )
    return parts, group


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Return the device that the group's tensors live on."""
    # The public ways to ask need a tensor, or name backends; this is what torch's own collectives ask.
    kind: str = dist.distributed_c10d._get_pg_default_device(group).type
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


def _spec_over(group: dist.ProcessGroup | None) -> ChunkShardingSpec:
    """Return the layout that cuts the first dimension over the group's ranks."""
    kind = _device_of(group).type
    placements = []
    for rank in range(dist.get_world_size(group)):
        global_rank = rank if group is None else dist.get_global_rank(group, rank)
        device = "cpu" if kind == "cpu" else f"{kind}:{global_rank % torch.get_device_module(kind).device_count()}"
        # A ShardedTensor names ranks globally, whatever its group. (Torch counts within the group here, so that it
        # refuses groups other than those of the first ranks.)
        placements.append(f"rank:{global_rank}/{device}")
    return ChunkShardingSpec(dim=0, placements=list(placements))


def _empty(properties: TensorProperties, size: torch.Size, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=properties.dtype, device=device, requires_grad=properties.requires_grad)


def _sharded(
    spec: ChunkShardingSpec, size: torch.Size, properties: TensorProperties, group: dist.ProcessGroup | None
) -> ShardedTensor:
    metadata = spec.build_metadata(
        size,
        ShardedTensorProperties(
            dtype=properties.dtype,
            layout=properties.layout,
            requires_grad=properties.requires_grad,
            memory_format=properties.memory_format,
            pin_memory=properties.pin_memory,
        ),
    )
    rank = dist.get_rank()
    device = _device_of(group)
    shards = [
        LocalShard(_empty(properties, torch.Size(place.shard_sizes), device), place)
        for place in metadata.shards_metadata
        if place.placement.rank() == rank  # type: ignore[union-attr]
    ]
    # The public constructors gather what every rank here knows already.
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, process_group=group)


class _PartLoadPlanner(DefaultLoadPlanner):
    """Load tensors that are parts of the saved ones: their own coordinates begin at an offset in the saved tensor.

    Args:
        offsets: Where the parts begin, in elements, by fqn.
    """

    def __init__(self, offsets: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._offsets = offsets

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None, "set_up_planner was called without the checkpoint's metadata"
        wholes = {fqn: value for fqn, value in self.state_dict.items() if fqn not in self._offsets}
        items = list(create_default_local_load_plan(wholes, self.metadata, cast_dtype=self.cast_dtype).items)
        for fqn, offset in self._offsets.items():
            entry = self.metadata.state_dict_metadata[fqn]
            assert isinstance(entry, TensorStorageMetadata)
            for shard in self.state_dict[fqn].local_shards():
                items += _reads_of_part(fqn, entry, shard, offset)
        return LoadPlan(items)


def _reads_of_part(
    fqn: str, entry: TensorStorageMetadata, shard: LocalShard, offset: tuple[int, ...]
) -> list[ReadItem]:
    own = torch.Size(shard.metadata.shard_offsets)
    wanted = ChunkStorageMetadata(
        offsets=torch.Size([base + inner for base, inner in zip(offset, own, strict=True)]),
        sizes=torch.Size(shard.metadata.shard_sizes),
    )
    missing = torch.Size(shard.metadata.shard_sizes).numel()
    items = []
    for item in create_read_items_for_chunk_list(fqn, entry, [wanted]):
        missing -= torch.Size(item.lengths).numel()
        # Found again by the shard's own offsets.
        items.append(dataclasses.replace(item, dest_index=dataclasses.replace(item.dest_index, offset=own)))
    if missing:
        raise PlanError(
            f"{fqn}: the checkpoint's chunks, of size {tuple(entry.size)}, do not cover offsets "
            f"{tuple(wanted.offsets)} sizes {tuple(wanted.sizes)} once"
        )
    return items
