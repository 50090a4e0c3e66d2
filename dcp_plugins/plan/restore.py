"""Loading what was saved: templates that are completed from a checkpoint's keys.

A load asks for what its template has. Two kinds of callers want what the checkpoint has instead: one that was given a
state dict of this package's getters, in which some containers complete themselves (`complete_in_place`), and one that
made the checkpoint itself, and gets all of it back (`RestoringLoadPlanner`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dcp_plugins.contract import Metadata
from dcp_plugins.errors import PlanError, listing
from dcp_plugins.format.containers import containers_of
from dcp_plugins.plan.flatten import get_element, paths_of, set_element, unflatten_state_dict
from dcp_plugins.templates import (
    Notes,
    SavedOptimizerState,
    SavedValue,
    completion_of,
    like_saved,
    overlapping,
    take_over,
)
from dcp_plugins.tensors.sharded import size_of

__all__ = ["Completed", "Outline", "complete_in_place", "restored_template", "saved_tree"]

Outline = Mapping[tuple[Any, ...], str]
"""Of a state dict with objects in it, by path: "object" for one with a state dict, "holder" for a container of some."""

_PLAIN_LEAVES = frozenset({torch.Tensor, torch.nn.Parameter, str, int, float, bool, type(None)})


@dataclass(frozen=True, slots=True)
class Completed:
    """What came of completing a template."""

    left: set[str] = field(default_factory=set)
    """The fqns that are left unread on purpose."""
    present: dict[int, torch.Tensor] | None = None
    """The tensors that were there before, by id: any other was allocated, and may be replaced by one of a class of its
    own. None if nothing was completed."""


def _tensors(value: Any) -> Iterator[tuple[int, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield id(value), value
    elif isinstance(value, (Mapping, list)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(entry)


def saved_tree(metadata: Metadata) -> dict[Any, Any]:
    """Return what a checkpoint holds: nested as it was saved, with the keys as they were, each value a `SavedValue`."""
    values = {fqn: SavedValue(fqn, entry) for fqn, entry in metadata.state_dict_metadata.items()}
    paths = paths_of(metadata)
    tree = unflatten_state_dict(values, paths)
    for path, container in paths.containers.items():
        if container.shared:
            actual = paths.actual(path)
            set_element(tree, actual, SavedOptimizerState(get_element(tree, actual), container.shared))
    return tree


def complete_in_place(template: dict[Any, Any], metadata: Metadata) -> Completed:
    """Complete the containers of a template that ask for it."""
    places = list(_completing(template, ()))
    if not places:
        return Completed()
    present = dict(_tensors(template))
    notes = Notes(overlapping=overlapping(tensor for _, tensor in _tensors(template)))
    saved = saved_tree(metadata)
    for path, container in places:
        below = get_element(saved, path)
        completion = completion_of(container)
        assert completion is not None
        completed = completion.completed(container, below if isinstance(below, Mapping) else {}, notes)
        take_over(container, completed)
    return Completed(notes.left, present)


def _completing(container: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], dict[Any, Any]]]:
    if isinstance(container, dict):
        if completion_of(container) is not None:
            yield path, container
            return
        if _PLAIN_LEAVES.issuperset(map(type, container.values())):
            return
        for key, value in container.items():
            yield from _completing(value, (*path, key))
    elif isinstance(container, list):
        for at, value in enumerate(container):
            yield from _completing(value, (*path, at))


def restored_template(
    template: Mapping[Any, Any], metadata: Metadata, outline: Outline, *, strict: bool
) -> tuple[dict[Any, Any], Completed]:
    """Return a template that asks for all that was saved under the root keys of another.

    Args:
        template: What the caller has, each object replaced by its state dict. Tensors of it are loaded in place where
            they have the saved size; containers are new.
        metadata: The checkpoint's.
        outline: Where the objects were.
        strict: Whether a key that the checkpoint lacks is an error; otherwise what is there stays.

    Returns:
        The new template, and what came of it.

    Raises:
        PlanError: Something that was saved has no place, or a tensor has not been saved; lists all of it.
    """
    saved = saved_tree(metadata)
    present = dict(_tensors(template))
    notes = Notes(overlapping=overlapping(tensor for _, tensor in _tensors(template)))
    restoring = _Restoring(outline, notes, is_recorded=containers_of(metadata) is not None, strict=strict)
    completion = completion_of(template)
    if completion is not None:
        return dict(completion.completed(template, saved, notes)), Completed(notes.left, present)
    made: dict[Any, Any] = {}
    for key, value in template.items():
        if key in saved:
            made[key] = restoring.like(saved[key], value, (key,), in_object=False)
        elif strict and (restoring.is_recorded or not _is_empty(value)):
            # Earlier releases, and torch, leave no trace of an empty container.
            restoring.missing.append(str(key))
        else:
            made[key] = value
    restoring.raise_problems(metadata)
    return made, Completed(notes.left, present)


def _is_empty(value: Any) -> bool:
    return isinstance(value, (Mapping, list)) and not value


class _Restoring:
    """The state of one walk over a template and what was saved."""

    def __init__(self, outline: Outline, notes: Notes, *, is_recorded: bool, strict: bool) -> None:
        self._notes = notes
        self.missing: list[str] = []
        self._outline = outline
        self.is_recorded = is_recorded
        self._strict = strict
        self._problems: list[str] = []

    def like(self, saved: Any, template: Any, path: tuple[Any, ...], *, in_object: bool) -> Any:
        """Return what to load into in the place of ``template``."""
        kind = self._outline.get(path)
        in_object = in_object or kind == "object"
        completion = completion_of(template)
        if completion is not None and isinstance(saved, Mapping):
            return completion.completed(template, saved, self._notes)
        if isinstance(saved, SavedValue):
            return self._leaf(saved, template, path, in_object=in_object)
        if kind == "holder":
            return self._holder(saved, template, path)
        self._find_missing(saved, template, path, in_object=in_object)
        if isinstance(saved, list):
            places = template if isinstance(template, list) else []
            return [
                self.like(value, places[at] if at < len(places) else None, (*path, at), in_object=in_object)
                for at, value in enumerate(saved)
            ]
        made, spelled = self._empty_like(saved, template)
        for key, value in saved.items():
            own = spelled.get(str(key), key)
            below = template.get(own) if isinstance(template, Mapping) else None
            made[own] = self.like(value, below, (*path, own), in_object=in_object)
        return made

    def raise_problems(self, metadata: Metadata) -> None:
        """Raise if there is anything that does not fit."""
        if self.missing:
            known = listing({str(path[0]) for path in paths_of(metadata).values()})
            self._problems.insert(
                0,
                f"Missing key in checkpoint state_dict: {listing(self.missing)}. The checkpoint holds: {known}."
                " Leave out of the state what was not saved",
            )
        if self._problems:
            raise PlanError("\n".join(["the checkpoint does not fit the state:", *self._problems[:24]]))

    def _leaf(self, saved: SavedValue, template: Any, path: tuple[Any, ...], *, in_object: bool) -> Any:
        def target_of(saved: SavedValue, template: Any) -> torch.Tensor:
            is_tensor = isinstance(template, torch.Tensor)
            fits = is_tensor and saved.size == size_of(template)
            if fits and (not in_object or template.dtype == saved.dtype) and self._notes.may_fill(template, saved):
                if saved.dtype is not None and not torch.can_cast(saved.dtype, template.dtype):
                    self._problems.append(
                        f"{saved.fqn}: the checkpoint holds {saved.dtype}, which a tensor of {template.dtype} cannot"
                        " hold without loss"
                    )
                # Its own memory, in its own layout.
                own: torch.Tensor = template
                return own
            if is_tensor and not fits and not in_object and template.numel():
                self._problems.append(
                    f"Size mismatch between saved {tuple(saved.size or ())} and current: {tuple(size_of(template))} for"
                    f" {saved.fqn}"
                )
                return template
            device = template.device if isinstance(template, torch.Tensor) else None
            assert saved.size is not None
            return torch.empty(saved.size, dtype=saved.dtype, device=device)

        return like_saved(saved, template, target_of)

    def _holder(self, saved: Any, template: Any, path: tuple[Any, ...]) -> Any:
        """Fit what was saved to a container of objects: each of them gets its own, and none is made up."""
        is_list = isinstance(template, list)
        own = dict(enumerate(template)) if is_list else dict(template)
        theirs = dict(enumerate(saved)) if isinstance(saved, list) else dict(saved)
        place = ".".join(map(str, path))
        lacking, left_over = own.keys() - theirs.keys(), theirs.keys() - own.keys()
        if lacking and self._strict:
            self.missing += [f"{place}.{key}" for key in lacking]
        # A value is placed where it was; what an object has saved needs an object.
        values = {key for key in left_over if not is_list and isinstance(theirs[key], SavedValue)}
        left_over -= values
        if left_over and self._strict:
            self._problems.append(
                f"The checkpoint holds under '{place}' what this run has no object for: {listing(left_over)}. Make the"
                " same objects as when it was saved"
            )
        made = {
            key: self.like(theirs[key], value, (*path, key), in_object=False) if key in theirs else value
            for key, value in own.items()
        }
        for key in values:
            made[key] = self.like(theirs[key], None, (*path, key), in_object=False)
        return [made[at] for at in range(len(made))] if is_list else made

    def _find_missing(self, saved: Any, template: Any, path: tuple[Any, ...], *, in_object: bool) -> None:
        """Note the tensors of a plain container that the checkpoint lacks: they would keep what they have, in silence.

        An object sees for itself what is missing in its state dict.
        """
        if in_object or not self._strict or not isinstance(template, (Mapping, list)):
            return
        theirs = {str(key) for key in (range(len(saved)) if isinstance(saved, list) else saved)}
        entries = enumerate(template) if isinstance(template, list) else template.items()
        for key, value in entries:
            if isinstance(value, torch.Tensor) and str(key) not in theirs:
                self.missing.append(".".join(map(str, (*path, key))))

    def _empty_like(self, saved: Mapping[Any, Any], template: Any) -> tuple[Any, dict[str, Any]]:
        """Return the new container, and keys by their strings where only the template tells of what type they are."""
        made: Any = {} if isinstance(saved, SavedOptimizerState) else _cleared(saved)
        if not isinstance(template, dict) or self.is_recorded:
            return made, {}
        # A checkpoint of stock torch, or of an earlier release, has strings for all keys.
        return _cleared(template), {str(key): key for key in template}


def _cleared(container: Any) -> Any:
    made = container.copy()
    made.clear()
    return made
