"""Write items, the data that a planner gives for them, and what was written: that each is what the plan says.

Items are written in *runs*: small tensors together, because what each costs by itself is more than its bytes, and
anything else alone.
"""

from __future__ import annotations

import functools
import math
import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dcp_plugins.contract import Metadata, SavePlan, SavePlanner, TensorStorageMetadata, WriteItem, WriteResult
from dcp_plugins.errors import StorageWriteError, listing
from dcp_plugins.format.container import Layout, predicted_layout
from dcp_plugins.format.memory import PLAIN_TENSORS
from dcp_plugins.pace import giving_way
from dcp_plugins.storage.threads import MIN_PARALLEL_PIECE_BYTES

__all__ = [
    "MAX_RUN_ITEMS",
    "Run",
    "are_as_planned",
    "check_against_plan",
    "check_results",
    "in_runs",
    "item_bytes",
    "metadata_bytes",
    "plain_bytes",
    "resolved_together",
    "runs_of",
]

MAX_RUN_ITEMS = 128
"""How many items a run has at most; all of it is less than threads are started for."""

_ShapeAndDtype = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True, slots=True)
class Run:
    """Items that are written together."""

    items: Sequence[WriteItem]
    planned: Sequence[_ShapeAndDtype] = ()
    """Shape and dtype of each, if they are small tensors; another item is looked at when it is written."""
    layouts: Sequence[Layout] = ()
    """Layout of the container of each, likewise."""


def item_bytes(item: WriteItem) -> int:
    """Return the bytes of the item's chunk; 0 for what is not a tensor, which nobody knows before it is pickled."""
    data = item.tensor_data
    return 0 if data is None else _chunk_bytes(tuple(data.chunk.sizes), data.properties.dtype)


@functools.lru_cache(4096)
def _chunk_bytes(sizes: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(sizes) * dtype.itemsize


def metadata_bytes(metadata: Metadata) -> int:
    """Return the bytes of all tensors of a checkpoint, by their dtypes; without values of other kinds."""
    return sum(
        math.prod(entry.size) * entry.properties.dtype.itemsize
        for entry in metadata.state_dict_metadata.values()
        if isinstance(entry, TensorStorageMetadata)
    )


def plain_bytes(items: Sequence[WriteItem], planner: SavePlanner) -> int:
    """Return the bytes of the items that are plain tensors: others, such as quantised ones, may have fewer."""
    of_tensors = (item for item in items if item.tensor_data is not None)
    return sum(item_bytes(item) for item in of_tensors if type(planner.resolve_data(item)) in PLAIN_TENSORS)


_Runs = tuple[list[Run], list[int]]

# By a plan's id. Plans are kept from save to save; what was found of one goes with it.
_known: dict[int, tuple[weakref.ref[SavePlan], list[WriteItem], _Runs]] = {}


def runs_of(plan: SavePlan) -> _Runs:
    """Return what ``in_runs`` returns for a plan's items; remembered as long as the plan exists."""
    key = id(plan)
    known = _known.get(key)
    if known is not None:
        reference, items, runs = known
        if reference() is plan and len(items) == len(plan.items) and all(map(operator.is_, items, plan.items)):
            return runs
    runs = in_runs(plan.items)
    _known[key] = weakref.ref(plan, lambda _: _known.pop(key, None)), list(plan.items), runs
    return runs


def in_runs(items: Sequence[WriteItem]) -> _Runs:
    """Return the items as runs, in their order, and the bytes of each run."""
    runs: list[Run] = []
    sizes_bytes: list[int] = []
    small: list[WriteItem] = []
    planned: list[_ShapeAndDtype] = []
    small_bytes = 0

    def end_run() -> None:
        nonlocal small, planned, small_bytes
        if small:
            runs.append(Run(small, planned, [predicted_layout(dtype, tuple(sizes)) for sizes, dtype in planned]))
            sizes_bytes.append(small_bytes)
            small, planned, small_bytes = [], [], 0

    for item in giving_way(items):
        if item.tensor_data is None:
            end_run()
            runs.append(Run((item,)))
            sizes_bytes.append(0)
            continue
        look = sizes, dtype = _planned_look(item)
        # Some planners give a list.
        nbytes = _chunk_bytes(tuple(sizes), dtype)
        if nbytes >= MIN_PARALLEL_PIECE_BYTES:
            end_run()
            runs.append(Run((item,)))
            sizes_bytes.append(nbytes)
            continue
        if len(small) == MAX_RUN_ITEMS or small_bytes + nbytes >= MIN_PARALLEL_PIECE_BYTES:
            end_run()
        small.append(item)
        planned.append(look)
        small_bytes += nbytes
    end_run()
    return runs, sizes_bytes


def resolved_together(run: Run, planner: SavePlanner) -> list[Any] | None:
    """Return what the planner resolves each item of a run to, or None if it has to be asked for one at a time.

    Then what it gives for one may be gone when it is asked for the next: torch's planners may use a buffer again.
    """
    # The class's: a planner that wraps another, and hands on what it does not know, has hooks of its own.
    resolve = getattr(type(planner), "resolve_data_of_items", None)
    resolved: list[Any] | None = None if resolve is None else resolve(planner, run.items)
    return resolved


_planned_look = operator.attrgetter("tensor_data.chunk.sizes", "tensor_data.properties.dtype")
_look = operator.attrgetter("shape", "dtype")
_index = operator.attrgetter("index")


def are_as_planned(run: Run, data: Sequence[Any]) -> bool:
    """Whether all data are small tensors of just the shapes and dtypes that were planned.

    False is no fault yet: ``check_against_plan`` tells.
    """
    return PLAIN_TENSORS.issuperset(map(type, data)) and list(map(_look, data)) == run.planned


def check_against_plan(item: WriteItem, tensor: torch.Tensor) -> None:
    """Refuse data that the metadata would misdescribe.

    Raises:
        StorageWriteError: The planner gave another kind, shape or dtype than it planned, or a tensor without memory.
    """
    data = item.tensor_data
    if data is None:
        raise StorageWriteError(f"{item.index.fqn}: the plan says bytes, the planner gave a tensor")
    if tensor.shape != data.chunk.sizes or tensor.dtype != data.properties.dtype:
        raise StorageWriteError(
            f"{item.index.fqn}: the plan says {tuple(data.chunk.sizes)} {data.properties.dtype}, the planner's "
            f"resolve_data gave {tuple(tensor.shape)} {tensor.dtype}; change the item in create_local_plan too"
        )
    if type(tensor) in PLAIN_TENSORS and tensor.layout is torch.strided and not tensor.is_meta and tensor.numel():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = tensor.storage_offset() + sum((length - 1) * step for length, step in steps)
        needed, there = (last + 1) * tensor.dtype.itemsize, tensor.untyped_storage().nbytes()
        if needed > there:
            raise StorageWriteError(
                f"{item.index.fqn}: the tensor needs {needed} bytes of its storage, which has {there}: its memory has "
                "been freed, as FSDP does between uses; save what get_model_state_dict returns"
            )


def check_results(results: list[WriteResult], plan: SavePlan) -> None:
    """Compare what was written with what was planned.

    Raises:
        StorageWriteError: Something planned was not written, or the reverse; lists the keys.
    """
    # The writer hands the plan's own index objects on, so comparing identities settles nearly every case.
    if len(results) == len(plan.items) and set(map(id, map(_index, plan.items))) == set(map(id, map(_index, results))):
        return
    planned = {item.index for item in plan.items}
    written = {result.index for result in results}
    if planned != written or len(results) != len(plan.items):
        missing = listing({index.fqn for index in planned - written})
        surplus = listing({index.fqn for index in written - planned})
        raise StorageWriteError(f"what was written is not what was planned: missing [{missing}], surplus [{surplus}]")
