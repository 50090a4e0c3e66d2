"""Planning a save: what each rank holds, and who writes it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import torch

from dcp_plugins.contract import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    SavePlan,
    SavePlanner,
    StorageMeta,
    TensorStorageMetadata,
    WriteItem,
    WriteItemType,
)
from dcp_plugins.errors import PlanError
from dcp_plugins.format.saved_mappings import attach, encoded_mappings
from dcp_plugins.pace import giving_way
from dcp_plugins.plan.flatten import FlattenMapping, KeyPaths, flatten_state_dict, keyed_by_strings
from dcp_plugins.plan.replicas import assign_replicas
from dcp_plugins.plan.validate import plan_problems
from dcp_plugins.plan.values import dump_value
from dcp_plugins.tensors import find_object, find_objects, flatten_sharded_tensors, signatures, write_items
from dcp_plugins.user_warnings import warn_user

__all__ = ["DefaultSavePlanner", "create_default_global_save_plan", "create_default_local_save_plan"]


class DefaultSavePlanner(SavePlanner):
    """Plan a save of a nested state dict; every method is a place where a subclass may change the plan.

    Args:
        flatten_state_dict: Enter nested dicts and lists, so that each tensor in them is stored on its own.
        flatten_sharded_tensors: Flatten a ``ShardedTensor`` of ``ShardedTensor`` (FSDP1 over tensor parallelism).
        dedup_replicated_tensors: Without effect, as in torch, where it is deprecated too.
        dedup_save_to_lowest_rank: Let the lowest rank that holds a replicated value write it, instead of balancing
            the bytes over the ranks.
        enable_plan_caching: Accepted for compatibility and without effect: while planner and writer are of this
            package and the state dict's description is unchanged, the engine always reuses the previous plan. What
            it compares covers dtypes and every other field that ends up in the plan.
    """

    mappings: FlattenMapping

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_replicated_tensors: bool | None = None,
        dedup_save_to_lowest_rank: bool = False,
        enable_plan_caching: bool = False,
    ) -> None:
        self.flatten_state_dict = flatten_state_dict
        self.flatten_sharded_tensors = flatten_sharded_tensors
        self.dedup_save_to_lowest_rank = dedup_save_to_lowest_rank
        self.mappings = {}
        self._enable_plan_caching = enable_plan_caching
        if dedup_replicated_tensors is not None:
            warn_user(
                "dedup_replicated_tensors is deprecated and has no effect: replicated values are always written once",
                FutureWarning,
            )

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        if self.flatten_state_dict:
            state_dict, mappings = flatten_state_dict(state_dict)
            mappings.pickle_keys()
            self.mappings = mappings
        if self.flatten_sharded_tensors:
            state_dict = flatten_sharded_tensors(state_dict)
        if not self.flatten_state_dict:
            state_dict = keyed_by_strings(state_dict)
        self.state_dict = state_dict
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        plan = create_default_local_save_plan(self.state_dict, self.is_coordinator)
        if self.flatten_state_dict:
            plan = dataclasses.replace(plan, planner_data=self.mappings)
        self.plan = plan
        return plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        diverging = frozenset[str]().union(*(getattr(plan.planner_data, "diverging", ()) for plan in all_plans))
        all_plans = assign_replicas(all_plans, to_lowest_rank=self.dedup_save_to_lowest_rank, diverging=diverging)
        global_plan, metadata = create_default_global_save_plan(all_plans)
        if self.flatten_state_dict:
            merged = KeyPaths()
            for plan in global_plan:
                # The first rank's paths count, and their order.
                merged.update({fqn: path for fqn, path in plan.planner_data.items() if fqn not in merged})
                if isinstance(plan.planner_data, KeyPaths):
                    merged.unite(plan.planner_data.saved_mappings)
            # Other writers pickle this field, and stock torch must be able to load the pickle: a plain dict.
            metadata = dataclasses.replace(metadata, planner_data=dict(merged))
            attach(metadata, encoded_mappings(merged.saved_mappings))
        problems = plan_problems(metadata, complete=len(global_plan) > 1)
        if problems:
            raise PlanError("Failed to validate global plan: " + "; ".join(problems[:12]))
        self.global_plan = global_plan
        self.metadata = metadata
        return global_plan, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self.plan = new_plan
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        resolved: torch.Tensor | io.BytesIO = self.transform_object(write_item, self.lookup_object(write_item.index))
        return resolved

    def resolve_data_of_items(self, write_items: Sequence[WriteItem]) -> list[torch.Tensor | io.BytesIO] | None:
        """Return what ``resolve_data`` returns for each item; of very many small tensors, in few calls.

        None if a hook of this planner is not the default one: what it returns is good until it is called again.
        """
        for hook in ("resolve_data", "lookup_object", "transform_object"):
            if getattr(getattr(self, hook), "__func__", None) is not getattr(DefaultSavePlanner, hook):
                return None
        found = find_objects(self.state_dict, [item.index for item in write_items])
        is_bytes = WriteItemType.BYTE_IO
        return [
            dump_value(value) if item.type is is_bytes else value
            for item, value in zip(write_items, found, strict=True)
        ]

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the value, or the local view of the tensor, that ``index`` names; to be overridden at will."""
        return find_object(self.state_dict, index)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Turn a looked-up value into what is written: a tensor as it is, anything else pickled into a ``BytesIO``."""
        if write_item.type is WriteItemType.BYTE_IO:
            return dump_value(object)
        return object

    def describe_state_dict(self) -> object | None:
        """Return a key that is equal for two state dicts only if they give equal plans; None if there is no telling.

        Cheap beside planning: this is what makes repeated saves of an unchanged model quick.
        """
        hooks = ("create_local_plan", "create_global_plan", "finish_plan")
        if any(getattr(type(self), hook) is not getattr(DefaultSavePlanner, hook) for hook in hooks):
            return None
        described = signatures(list(self.state_dict.values()))
        if described is None:
            return None
        # Paths are part of the plan: {"a": {"b": t}} and {"a.b": t} have the same fqns.
        paths = (list(self.mappings.values()), getattr(self.mappings, "saved_mappings", None))
        return (self.flatten_state_dict, self.dedup_save_to_lowest_rank, list(self.state_dict), described, paths)


def create_default_local_save_plan(state_dict: dict[str, Any], is_coordinator: bool) -> SavePlan:
    """Return the plan that lists all that this rank holds of a flat state dict, replicas included."""
    items: list[WriteItem] = []
    for fqn, value in giving_way(state_dict.items()):
        items += write_items(fqn, value)
    return SavePlan(items)


def create_default_global_save_plan(
    all_plans: list[SavePlan], rewrite_index_hints: bool = True
) -> tuple[list[SavePlan], Metadata]:
    """Return the plans with each index's hint set to its chunk's position in the metadata, and that metadata.

    Args:
        all_plans: Plans, indexed by rank, in which every item stands once.
        rewrite_index_hints: False leaves the items as they are.

    Raises:
        PlanError: Two ranks describe one fqn differently, or list it twice; names every such fqn.
    """
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    problems: list[str] = []
    new_plans = []
    for rank, plan in enumerate(all_plans):
        new_items: list[WriteItem] = []
        for item in giving_way(plan.items):
            fqn = item.index.fqn
            entry = entries.get(fqn)
            data = item.tensor_data
            if data is None:
                if entry is not None:
                    problems.append(f"{fqn}: rank {rank} holds a non-tensor where another rank holds a value too")
                entries[fqn] = BytesStorageMetadata()
                new_items.append(item)
                continue
            if entry is None:
                entry = TensorStorageMetadata(properties=data.properties, size=data.size, chunks=[])
                entries[fqn] = entry
            elif not isinstance(entry, TensorStorageMetadata):
                problems.append(f"{fqn}: rank {rank} holds a tensor where another rank holds a non-tensor")
                continue
            elif item.type is not WriteItemType.SHARD:
                problems.append(f"{fqn}: rank {rank} holds a plain tensor, another rank holds part of it too")
                continue
            elif entry.size != data.size or entry.properties.dtype != data.properties.dtype:
                problems.append(
                    f"{fqn}: rank {rank} has size {tuple(data.size)} {data.properties.dtype}, "
                    f"another rank {tuple(entry.size)} {entry.properties.dtype}"
                )
                continue
            if rewrite_index_hints and item.index.index != len(entry.chunks):
                index = MetadataIndex(fqn, item.index.offset, len(entry.chunks))
                item = WriteItem(index, item.type, item.bytes_io_data, data)
            new_items.append(item)
            entry.chunks.append(data.chunk)
        new_plans.append(dataclasses.replace(plan, items=new_items))
    if problems:
        raise PlanError("the ranks' state dicts do not fit together: " + "; ".join(problems[:12]))
    return new_plans, Metadata(entries)
