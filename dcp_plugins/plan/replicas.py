"""Which rank writes a value that several ranks hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

from dcp_plugins.contract import MetadataIndex, SavePlan, WriteItem
from dcp_plugins.pace import giving_way

__all__ = ["assign_replicas", "item_nbytes"]


def item_nbytes(item: WriteItem) -> int:
    """Return the bytes of tensor data that the item writes (its chunk, not the whole tensor); 0 if unknown."""
    if item.tensor_data is not None:
        return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
    return item.bytes_io_data.nbytes if item.bytes_io_data is not None else 0


def assign_replicas(
    plans: list[SavePlan], *, to_lowest_rank: bool = False, diverging: Collection[str] = ()
) -> list[SavePlan]:
    """Return plans in which every item stands once, balanced by bytes over the ranks that hold it.

    What only one rank holds is counted first; then the replicated items, largest first, each go to the holder with the
    least to write. The result depends on the plans alone, so it is the same whichever rank computes it.

    Args:
        plans: The local plans, indexed by rank, with replicated items listed by every holder.
        to_lowest_rank: Give each replicated item to its lowest holder instead.
        diverging: The fqns of values that ranks may hold with different contents: their lowest holder writes them.
    """
    if len(plans) == 1:
        return plans
    holders: dict[MetadataIndex, list[int]] = {}
    items: dict[MetadataIndex, WriteItem] = {}
    for rank, plan in enumerate(plans):
        for item in giving_way(plan.items):
            holders.setdefault(item.index, []).append(rank)
            items.setdefault(item.index, item)
    writer: dict[MetadataIndex, int] = {}
    load_bytes = [0] * len(plans)
    replicated = []
    for index, ranks in giving_way(holders.items()):
        if len(ranks) == 1 or to_lowest_rank or index.fqn in diverging:
            writer[index] = ranks[0]
            load_bytes[ranks[0]] += item_nbytes(items[index])
        else:
            replicated.append(index)
    # The sort is stable, so equal sizes keep the order of the first plan that lists them.
    replicated.sort(key=lambda index: -item_nbytes(items[index]))
    for index in giving_way(replicated):
        rank = min(holders[index], key=lambda rank: load_bytes[rank])
        writer[index] = rank
        # Values of unknown size count a little, so that many of them spread over the ranks.
        load_bytes[rank] += item_nbytes(items[index]) or 1
    return [dataclasses.replace(plan, items=_once(plan.items, rank, writer)) for rank, plan in enumerate(plans)]


def _once(items: list[WriteItem], rank: int, writer: dict[MetadataIndex, int]) -> list[WriteItem]:
    kept: dict[MetadataIndex, WriteItem] = {}
    for item in giving_way(items):
        if writer[item.index] == rank:
            kept.setdefault(item.index, item)
    return list(kept.values())
