"""Templates: the state dicts that a load fills, and the dicts in them that are completed from the checkpoint's keys.

A load reads the keys that its template has. A `CompletingDict` in the template changes that for its own place: its
`Completion` sees what the checkpoint holds there, and returns the dict to load into. The returned dict has the saved
keys that the template lacked, and lacks the keys that were not saved.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dcp_plugins.contract import BytesStorageMetadata, TensorStorageMetadata
from dcp_plugins.format.memory import PLAIN_TENSORS
from dcp_plugins.tensors.sharded import size_of

__all__ = [
    "CompletingDict",
    "Completion",
    "Notes",
    "SavedOptimizerState",
    "SavedValue",
    "apply_completed",
    "completion_of",
    "like_saved",
    "only_as_asked",
    "overlapping",
    "saved_values",
]

COMPLETING_CHILD_KEY = "state"
"""A `CompletingDict` under this key may complete the dict that holds it, see ``completes_parent``."""


@dataclass(frozen=True, slots=True)
class SavedValue:
    """A value of a checkpoint, as the metadata describes it: a leaf of the tree that `saved_tree` returns."""

    fqn: str
    """The value's key in the checkpoint."""
    entry: TensorStorageMetadata | BytesStorageMetadata
    """The description of the value in ``.metadata``."""

    @property
    def size(self) -> torch.Size | None:
        """The global size of a tensor; None for any other value."""
        return self.entry.size if isinstance(self.entry, TensorStorageMetadata) else None

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of a tensor; None for any other value."""
        return self.entry.properties.dtype if isinstance(self.entry, TensorStorageMetadata) else None


class SavedOptimizerState(dict[Any, Any]):
    """The saved state of an optimizer: by parameter, each value a `SavedValue`.

    Args:
        values: The saved state.
        shared: The keys, as strings, that belong to no parameter.
    """

    def __init__(self, values: Mapping[Any, Any], shared: tuple[str, ...]) -> None:
        super().__init__(values)
        self.shared = shared


@dataclass(slots=True)
class Notes:
    """The notes on one template, shared by its completions: which tensors may be filled, and which values are left."""

    left_unread: set[str] = field(default_factory=set)
    """Gets the fqns that are left unread on purpose."""
    overlapping: frozenset[int] = frozenset()
    """The ids of the template's tensors that share memory with another one: two values cannot be loaded there."""

    def may_fill(self, tensor: Any, saved: SavedValue) -> bool:
        """Tell whether a value can be loaded into a tensor of the template: it has the size, and memory of its own."""
        return isinstance(tensor, torch.Tensor) and id(tensor) not in self.overlapping and size_of(tensor) == saved.size


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
    first = local.data_ptr()
    if local.is_contiguous():
        return first, first + local.nbytes, True
    reach = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    is_dense = all(stride for size, stride in zip(local.shape, local.stride(), strict=True) if size > 1)
    return first, first + (reach + 1) * local.element_size(), is_dense


class Completion(Protocol):
    """Decides what a load reads into one dict of a template.

    The load's planner calls it on each rank, after the metadata was read and before data is read.
    """

    def completed(self, template: Mapping[Any, Any], saved: Mapping[Any, Any], notes: Notes) -> Mapping[Any, Any]:
        """Return the dict to load into, without changing ``template`` or ``saved``.

        Args:
            template: The dict as the caller gave it.
            saved: What the checkpoint has at its place: nested dicts and lists, each value a `SavedValue`.
            notes: The notes on the template. The method adds the fqns that this rank leaves unread on purpose.

        Raises:
            PlanError: The template and the checkpoint do not fit; nothing has been read then.
        """
        ...


class CompletingDict(dict[Any, Any]):
    """A dict that a load completes from the checkpoint's keys.

    A copy completes itself as well. The pickle is that of an ``OrderedDict``, so that no file depends on this class.

    Args:
        values: The entries of the dict.
        completion: Decides what a load reads.
        completes_parent: The completion is for the dict that holds this one under the key "state". That dict may be an
            ordinary one, which a user's ``dict(...)`` copies without losing the completion.
    """

    def __init__(self, values: Mapping[Any, Any], completion: Completion, *, completes_parent: bool = False) -> None:
        super().__init__(values)
        self.completion = completion
        self.completes_parent = completes_parent

    def __copy__(self) -> CompletingDict:
        return CompletingDict(self, self.completion, completes_parent=self.completes_parent)

    def copy(self) -> CompletingDict:
        """Return a shallow copy that completes itself as well."""
        return self.__copy__()

    def __deepcopy__(self, memo: dict[int, Any]) -> CompletingDict:
        # The completion refers to live parameters, which must not be copied.
        copied = CompletingDict({}, self.completion, completes_parent=self.completes_parent)
        memo[id(self)] = copied
        copied.update({copy.deepcopy(key, memo): copy.deepcopy(value, memo) for key, value in self.items()})
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Torch's weights-only unpickler admits OrderedDict as a global, and refuses dict.
        return OrderedDict, (), None, None, iter(self.items())


def apply_completed(container: dict[Any, Any], completed: Mapping[Any, Any]) -> None:
    """Replace the entries and the completion of a template's dict, in place, by those of the dict loaded for it."""
    container.clear()
    container.update(completed)
    if isinstance(container, CompletingDict) and isinstance(completed, CompletingDict):
        container.completion = completed.completion


class _AsAsked:
    def completed(self, template: Mapping[Any, Any], saved: Mapping[Any, Any], notes: Notes) -> Mapping[Any, Any]:
        made: dict[Any, Any] = {}
        for key, value in saved.items():
            own = template.get(key)
            if isinstance(value, Mapping) and isinstance(own, Mapping):
                made[key] = self.completed(own, value, notes)
            elif key in template:
                made[key] = own
            else:
                notes.left_unread.update(found.fqn for found in saved_values(value))
        return made


def only_as_asked(values: Mapping[Any, Any]) -> CompletingDict:
    """Return nested dicts that a restore fills without what else was saved below them: other ranks' values, say."""
    return CompletingDict(values, _AsAsked())


def completion_of(container: Any) -> Completion | None:
    """Return the completion of a dict of a template; None if a load reads just the keys that the dict has."""
    if isinstance(container, CompletingDict) and not container.completes_parent:
        return container.completion
    held = container.get(COMPLETING_CHILD_KEY) if isinstance(container, dict) else None
    return held.completion if isinstance(held, CompletingDict) and held.completes_parent else None


def like_saved(saved: Any, template: Any, target_of: Callable[[SavedValue, Any], Any]) -> Any:
    """Return dicts and lists like the saved ones, to load into.

    Args:
        saved: Nested dicts and lists of `SavedValue`, or one `SavedValue`.
        template: Whatever the caller has at this place.
        target_of: Returns the tensor to fill, given a saved tensor and the template's value at its place.
    """
    if isinstance(saved, SavedValue):
        if saved.size is None:
            # The loaded value replaces this one. A dict, a list or a tensor here would be planned as something else.
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
    """Yield the values in nested dicts and lists."""
    if isinstance(saved, SavedValue):
        yield saved
    elif isinstance(saved, Mapping):
        for value in saved.values():
            yield from saved_values(value)
    elif isinstance(saved, list):
        for value in saved:
            yield from saved_values(value)
