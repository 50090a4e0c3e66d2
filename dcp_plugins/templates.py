"""Templates: the state dicts that a load fills, and the dicts in them that are completed from the checkpoint's keys.

A load reads the keys that its template has. A `CompletingDict` in the template changes that for its own place: its
`Completion` sees what the checkpoint holds there, and returns the dict to load into. The returned dict has the saved
keys that the template lacked, and lacks the keys that were not saved.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dcp_plugins.contract import BytesStorageMetadata, TensorStorageMetadata

__all__ = [
    "CompletingDict",
    "Completion",
    "SavedOptimizerState",
    "SavedValue",
    "apply_completed",
    "completion_of",
    "like_saved",
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


class Completion(Protocol):
    """Decides what a load reads into one dict of a template.

    The load's planner calls it on each rank, after the metadata was read and before data is read.
    """

    def completed(
        self, template: Mapping[Any, Any], saved: Mapping[Any, Any], left_unread: set[str]
    ) -> Mapping[Any, Any]:
        """Return the dict to load into, without changing ``template`` or ``saved``.

        Args:
            template: The dict as the caller gave it.
            saved: What the checkpoint has at its place: nested dicts and lists, each value a `SavedValue`.
            left_unread: The method adds the fqns that this rank leaves unread on purpose.

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
    made = copy.copy(saved)
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
