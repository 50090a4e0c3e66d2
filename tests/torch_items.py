"""The write items that stock torch makes, with the properties that this package records."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.distributed.checkpoint.planner_helpers import _create_write_items

from dcp_plugins.contract import WriteItem

__all__ = ["torch_write_items"]


def torch_write_items(fqn: str, value: Any) -> list[WriteItem]:
    """Return torch's items, without the strides that torch 2.15 adds to the properties: older ones cannot read them."""
    items = []
    for item in _create_write_items(fqn, value):
        data = item.tensor_data
        if data is not None and getattr(data.properties, "strides", None) is not None:
            field: Any = {"strides": None}
            data = dataclasses.replace(data, properties=dataclasses.replace(data.properties, **field))
        items.append(dataclasses.replace(item, tensor_data=data))
    return items
