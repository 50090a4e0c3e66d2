"""What a load fills: a template, and in it containers that a checkpoint's keys complete.

A plain template asks for what it has. A `CompletingDict` in it is handed what the checkpoint has below its place, and
answers with the container to load into: with values that the template lacked, and without those that were not saved.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from dcp_plugins.contract import BytesStorageMetadata, TensorStorageMetadata
from dcp_plugins.format.memory import PLAIN_TENSORS

__all__ = [
    "CompletingDict",
    "Completion",
    "Notes",
    "SavedOptimizerState",
    "SavedValue",
    "completion_of",
    "like_saved",
    "overlapping",
    "saved_values",
    "take_over",
]

HOLDER_KEY = "state"
"""Under which key a `CompletingDict` stands for the mapping that holds it."""


@dataclass(frozen=True, slots=True)
class SavedValue:
    """One value of a checkpoint, as its metadata describes it; the leaf of a nested dict of what was saved."""

    fqn: str
    """Its key in the checkpoint."""
    entry: TensorStorageMetadata | BytesStorageMetadata

    @property
    def size(self) -> torch.Size | None:
        """The global size of a tensor; None for any other value."""
        return self.entry.size if isinstance(self.entry, TensorStorageMetadata) else None

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of a tensor; None for any other value."""
        return self.entry.properties.dtype if isinstance(self.entry, TensorStorageMetadata) else None


class SavedOptimizerState(dict[Any, Any]):
    """The saved state of an optimizer, by parameter.

    Args:
        values: What is in it.
        shared: The keys, as strings, that are no parameter's.
    """

    def __init__(self, values: Mapping[Any, Any], shared: tuple[str, ...]) -> None:
        super().__init__(values)
        self.shared = shared


@dataclass(slots=True)
class Notes:
    """What the completions of one template tell and are told."""

    left: set[str] = field(default_factory=set)
    """Gets the fqns that are left unread on purpose."""
    overlapping: frozenset[int] = frozenset()
    """The ids of the template's tensors that share memory with another one: two values cannot be loaded there."""

    def may_fill(self, tensor: Any, saved: SavedValue) -> bool:
        """Tell whether a value can be loaded into a tensor of the template: it has the size, and memory of its own."""
        return (
            isinstance(tensor, torch.Tensor) and id(tensor) not in self.overlapping and _size_of(tensor) == saved.size
        )


def overlapping(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    """Return the ids of tensors that share elements with another one, or within themselves.

    A tensor that occurs twice shares all of them. Tensors without memory of their own class are not looked at.
    """
    spans: list[tuple[int, int, int]] = []
    found: set[int] = set()
    for tensor in tensors:
        span = _span_of(tensor)
        if span is None:
            continue
        first, end, is_dense = span
        if not is_dense:
            found.add(id(tensor))
        spans.append((first, end, id(tensor)))
    spans.sort()
    end_so_far, widest = 0, 0
    for first, end, tensor_id in spans:
        if first < end_so_far:
            found.update((tensor_id, widest))
        if end > end_so_far:
            end_so_far, widest = end, tensor_id
    return frozenset(found)


def _span_of(tensor: torch.Tensor) -> tuple[int, int, bool] | None:
    """Return a tensor's first and last byte (exclusive), and whether no two of its elements are one."""
    local = getattr(tensor, "_local_tensor", tensor)
    if type(local) not in PLAIN_TENSORS or local.is_meta or local.layout is not torch.strided or not local.numel():
        return None
    reach = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    is_dense = all(stride for size, stride in zip(local.shape, local.stride(), strict=True) if size > 1)
    first = local.data_ptr()
    return first, first + (reach + 1) * local.element_size(), is_dense


def _size_of(tensor: torch.Tensor) -> torch.Size:
    if isinstance(tensor, ShardedTensor):  # Its own attribute warns that the class is deprecated.
        return tensor.metadata().size
    return tensor.shape


class Completion(Protocol):
    """Says what to load into one container of a template. Called on each rank, before anything is read."""

    def completed(self, template: Mapping[Any, Any], saved: Mapping[Any, Any], notes: Notes) -> Mapping[Any, Any]:
        """Return the container to load into; neither argument is changed.

        Args:
            template: The container as the caller gave it.
            saved: What the checkpoint has at its place: nested, each value a `SavedValue`.
            notes: Of the template that the container is in.

        Raises:
            PlanError: They do not fit; nothing has been read then.
        """
        ...


class CompletingDict(dict[Any, Any]):
    """A dict that a load completes from what was saved.

    Copies of it complete as well. Its pickle is that of an ordinary dict, so that no file depends on this class.

    Args:
        values: What is in it.
        completion: Says what to load.
        for_holder: The completion is for the mapping that holds this one under the key "state". That mapping can be
            copied by ``dict(...)`` without losing the completion.
    """

    def __init__(self, values: Mapping[Any, Any], completion: Completion, *, for_holder: bool = False) -> None:
        super().__init__(values)
        self.completion = completion
        self.for_holder = for_holder

    def __copy__(self) -> CompletingDict:
        return CompletingDict(self, self.completion, for_holder=self.for_holder)

    def copy(self) -> CompletingDict:
        """Return a shallow copy that completes as well."""
        return self.__copy__()

    def __deepcopy__(self, memo: dict[int, Any]) -> CompletingDict:
        # The completion refers to live parameters, which must not be copied.
        copied = CompletingDict({}, self.completion, for_holder=self.for_holder)
        memo[id(self)] = copied
        copied.update({copy.deepcopy(key, memo): copy.deepcopy(value, memo) for key, value in self.items()})
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        # ``dict`` itself is no global that torch's weights-only unpickler admits.
        return OrderedDict, (), None, None, iter(self.items())


def take_over(container: dict[Any, Any], completed: Mapping[Any, Any]) -> None:
    """Give a container of a template the entries that it was completed to, and what is known of them."""
    container.clear()
    container.update(completed)
    if isinstance(container, CompletingDict) and isinstance(completed, CompletingDict):
        container.completion = completed.completion


def completion_of(container: Any) -> Completion | None:
    """Return the completion of a container of a template; None if it asks for just what it has."""
    if isinstance(container, CompletingDict) and not container.for_holder:
        return container.completion
    held = container.get(HOLDER_KEY) if isinstance(container, dict) else None
    return held.completion if isinstance(held, CompletingDict) and held.for_holder else None


def like_saved(saved: Any, template: Any, target_of: Callable[[SavedValue, Any], Any]) -> Any:
    """Return containers like the saved ones, to load into.

    Args:
        saved: Nested containers of `SavedValue`.
        template: What the caller has at this place: anything.
        target_of: Returns the tensor to fill for a saved tensor, given what the template has in its place.
    """
    if isinstance(saved, SavedValue):
        if saved.size is None:
            # It will be replaced. A container would be entered, and a tensor asked for.
            return None if isinstance(template, (Mapping, list, torch.Tensor)) else template
        return target_of(saved, template)
    if isinstance(saved, list):
        places = template if isinstance(template, list) else []
        return [
            like_saved(value, places[at] if at < len(places) else None, target_of) for at, value in enumerate(saved)
        ]
    made = dict(saved) if isinstance(saved, SavedOptimizerState) else copy.copy(saved)
    for key, value in saved.items():
        made[key] = like_saved(value, template.get(key) if isinstance(template, Mapping) else None, target_of)
    return made


def saved_values(saved: Any) -> Iterator[SavedValue]:
    """Yield the values in nested containers."""
    if isinstance(saved, SavedValue):
        yield saved
    elif isinstance(saved, Mapping):
        for value in saved.values():
            yield from saved_values(value)
    elif isinstance(saved, list):
        for value in saved:
            yield from saved_values(value)
