"""Planning a save in which ranks may hold one value with different contents."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from dcp_plugins.contract import StorageMeta
from dcp_plugins.plan.flatten import KeyPath, KeyPaths
from dcp_plugins.plan.save import DefaultSavePlanner

__all__ = ["DivergingSavePlanner"]


class DivergingSavePlanner(DefaultSavePlanner):
    """Let the lowest rank that holds a value write it, if the ranks may hold it with different contents.

    The writing of all other values is balanced over the ranks. With all values balanced, a checkpoint could hold the
    mean of a batch norm as rank 0 has it, and the variance as rank 1 has it.

    Args:
        diverging: The paths of these values in the state dict. A path stands for all values beneath it.
    """

    def __init__(self, diverging: Collection[KeyPath]) -> None:
        super().__init__()
        self._diverging = frozenset(diverging)

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        assert isinstance(self.mappings, KeyPaths)
        if not self._diverging:
            return
        depths = sorted({len(path) for path in self._diverging})
        self.mappings.diverging = frozenset(
            fqn for fqn, path in self.mappings.items() if any(path[:depth] in self._diverging for depth in depths)
        )

    def describe_state_dict(self) -> object | None:
        described = super().describe_state_dict()
        assert isinstance(self.mappings, KeyPaths)
        return None if described is None else (described, self.mappings.diverging)
