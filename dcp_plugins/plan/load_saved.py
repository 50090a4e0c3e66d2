"""Planners of loads that are driven by the checkpoint's keys: into an empty dict, or into the objects that saved it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Any

import torch

from dcp_plugins.contract import Metadata, TensorStorageMetadata
from dcp_plugins.errors import PlanError, listing
from dcp_plugins.format.mapping_keys import text_of
from dcp_plugins.format.trust import SafeGlobal
from dcp_plugins.plan.flatten import paths_of, unflatten_state_dict
from dcp_plugins.plan.load import DefaultLoadPlanner
from dcp_plugins.plan.restore import CompletionResult, Outline, restored_template

logger = logging.getLogger(__name__)

__all__ = ["EmptyStateDictLoadPlanner", "RestoringLoadPlanner"]


class RestoringLoadPlanner(DefaultLoadPlanner):
    """Plan a load of everything that was saved under the state dict's root keys, whatever it has below them.

    Every saved value is loaded with its structure, or the load fails and names the values that have no place. The
    planner replaces the dicts and lists in the state dict by new ones; it keeps tensors that have the saved size, to
    load into their memory.

    Args:
        outline: The places of the objects that will get their state dict.
        allow_partial_load: Leave values that the checkpoint lacks as they are, and saved values without a place unread.
        weights_only: As in `DefaultLoadPlanner`.
        safe_globals: As in `DefaultLoadPlanner`.
    """

    def __init__(
        self,
        outline: Outline,
        *,
        allow_partial_load: bool = False,
        weights_only: bool = True,
        safe_globals: Iterable[SafeGlobal] = (),
    ) -> None:
        super().__init__(
            allow_partial_load=allow_partial_load,
            weights_only=weights_only,
            safe_globals=safe_globals,
            unread="ignore" if allow_partial_load else "error",
        )
        self._outline = outline

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        if is_coordinator and metadata is not None:
            left = {str(path[0]) for path in paths_of(metadata).values()} - set(map(text_of, state_dict))
            if left:
                logger.info(
                    "these root keys of the checkpoint are not in the state, and stay unread: %s", listing(left)
                )
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def complete(self, state_dict: dict[str, Any], metadata: Metadata | None) -> CompletionResult:
        assert metadata is not None, "set_up_planner was called without the checkpoint's metadata"
        made, completed = restored_template(
            state_dict, metadata, self._outline, self.key_decoder(), strict=not self.allow_partial_load
        )
        state_dict.clear()
        state_dict.update(made)
        return completed


class EmptyStateDictLoadPlanner(DefaultLoadPlanner):
    """Plan a load into an empty dict: rebuild the state dict that was saved, on one process, from the metadata.

    Args:
        keys: Load only these: full fqns, or prefixes that end at a path element. None loads everything.
    """

    def __init__(self, keys: Collection[str] | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The user has named the keys to load; the others need no warning.
        self.unread = "ignore"
        self.keys = None if keys is None else set(keys)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        if state_dict or metadata is None:
            raise ValueError(
                f"{type(self).__name__} fills an empty dict from a checkpoint's metadata, "
                f"found a dict of {len(state_dict)} keys and metadata {metadata!r}"
            )
        paths = paths_of(metadata)
        found: set[str] = set()
        values: dict[str, Any] = {}
        for fqn, entry in metadata.state_dict_metadata.items():
            wanted = self._matches(fqn, paths[fqn])
            if self.keys is not None and not wanted:
                continue
            found |= wanted
            value: Any = entry
            if isinstance(entry, TensorStorageMetadata):
                value = _allocated(entry)
            values[fqn] = value
        self.adopted_keys = metadata.state_dict_metadata.keys()
        if self.keys is not None:
            # An empty mapping has no fqn, and `keys` may name it all the same.
            mappings = {path: self._matches(".".join(map(str, path)), path) for path in paths.saved_mappings}
            found |= set().union(*mappings.values())
            if found != self.keys:
                raise PlanError(f"Missing key in checkpoint: {listing(self.keys - found)}")
            paths = paths.only(values, [path for path, wanted in mappings.items() if wanted])
        tree = unflatten_state_dict(values, paths)
        keys = self.key_decoder()
        keys.decode_keys(tree, ())
        self._key_texts = keys.texts
        state_dict.update(tree)
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def complete(self, state_dict: dict[str, Any], metadata: Metadata | None) -> CompletionResult:
        return CompletionResult(key_texts=self._key_texts)

    def _matches(self, fqn: str, path: tuple[str | int, ...]) -> set[str]:
        if self.keys is None:
            return set()
        prefixes = {".".join(map(str, path[: depth + 1])) for depth in range(len(path))}
        return self.keys & (prefixes | {fqn})


def _allocated(entry: TensorStorageMetadata) -> torch.Tensor:
    dtype = entry.properties.dtype
    if dtype in _QUANTISED:
        return torch._empty_affine_quantized(entry.size, scale=1.0, zero_point=0, dtype=dtype)
    return torch.empty(entry.size, dtype=dtype)


_QUANTISED = frozenset({torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4})
