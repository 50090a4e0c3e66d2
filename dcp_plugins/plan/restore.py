"""Completing templates from a checkpoint's keys.

A load reads the keys that its template has. Two kinds of templates ask for the checkpoint's keys instead. A state dict
of this package's getters has some `CompletingDict` in it: `complete_in_place` completes these alone. The manager and
the adapters, which saved the checkpoint themselves, ask for everything below the root keys: `restored_template`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dcp_plugins.contract import Metadata
from dcp_plugins.errors import PlanError, listing
from dcp_plugins.format.mapping_keys import text_of
from dcp_plugins.format.saved_mappings import saved_mappings_of
from dcp_plugins.plan.flatten import KeyTexts, get_element, paths_of, set_element, unflatten_state_dict
from dcp_plugins.plan.saved_keys import KeyDecoder, saved_below
from dcp_plugins.templates import (
    Notes,
    SavedOptimizerState,
    SavedValue,
    apply_completed,
    completion_of,
    like_saved,
    overlapping,
)
from dcp_plugins.tensors.sharded import dtype_of, size_of

__all__ = ["CompletionResult", "Outline", "Role", "complete_in_place", "restored_template", "saved_tree"]

Role = Literal["object", "holder"]
"""The kind of a place in a state: an object with a ``state_dict`` method, or a dict or list that holds such objects."""
Outline = Mapping[tuple[Any, ...], Role]
"""The roles of the places in a state, by path; places with plain values are left out."""

_PLAIN_LEAVES = frozenset({torch.Tensor, torch.nn.Parameter, str, int, float, bool, type(None)})


@dataclass(frozen=True, slots=True)
class CompletionResult:
    """The facts about a completed template that the planner needs."""

    left_unread: set[str] = field(default_factory=set)
    """The fqns that this rank leaves unread on purpose."""
    own_tensors: dict[int, torch.Tensor] | None = None
    """The caller's tensors, by id. The completion allocated the others, which a load may replace by saved tensors of a
    subclass. None if nothing was completed."""
    key_texts: KeyTexts = field(default_factory=dict)
    """The texts in the checkpoint's paths of keys that were decoded."""


def _result(notes: Notes, tensors: list[torch.Tensor], keys: KeyDecoder) -> CompletionResult:
    return CompletionResult(notes.left_unread, {id(tensor): tensor for tensor in tensors}, keys.texts)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(entry)


def saved_tree(metadata: Metadata) -> dict[Any, Any]:
    """Return a checkpoint's state dict, nested and keyed as it was saved.

    Each value in it is a `SavedValue`. A key that is not plain data is a `PickledKey`, until a `KeyDecoder` decodes it.
    """
    values = {fqn: SavedValue(fqn, entry) for fqn, entry in metadata.state_dict_metadata.items()}
    paths = paths_of(metadata)
    tree = unflatten_state_dict(values, paths)
    for path, found in paths.saved_mappings.items():
        if found.shared:
            actual = paths.actual(path)
            set_element(tree, actual, SavedOptimizerState(get_element(tree, actual), found.shared))
    return tree


def complete_in_place(template: dict[Any, Any], metadata: Metadata, keys: KeyDecoder) -> CompletionResult:
    """Complete each dict of a template that has a completion; the dicts keep their identity."""
    places = list(_completing(template, ()))
    if not places:
        return CompletionResult()
    tensors = list(_tensors(template))
    notes = Notes(overlapping=overlapping(tensors))
    saved = saved_tree(metadata)
    for path, container in places:
        below = saved_below(saved, path)
        keys.decode_keys(below, tuple(key if type(key) is int else text_of(key) for key in path))
        completion = completion_of(container)
        assert completion is not None
        completed = completion.completed(container, below if isinstance(below, Mapping) else {}, notes)
        apply_completed(container, completed)
    return _result(notes, tensors, keys)


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
    template: Mapping[Any, Any], metadata: Metadata, outline: Outline, keys: KeyDecoder, *, strict: bool
) -> tuple[dict[Any, Any], CompletionResult]:
    """Return a template that asks for everything that was saved under the root keys of another template.

    Args:
        template: The caller's state dict, each object replaced by the object's state dict. The result has its tensors
            where they have the saved size, and new dicts and lists.
        metadata: The checkpoint's metadata.
        outline: The places of the objects.
        keys: Decodes the keys below the root keys.
        strict: Whether a key that the checkpoint lacks is an error; otherwise the caller's value stays.

    Returns:
        The new template, and what the planner has to know of it.

    Raises:
        PlanError: A saved value has no place, or a tensor of the caller was not saved; lists all of them.
    """
    saved = saved_tree(metadata)
    tensors = list(_tensors(template))
    notes = Notes(overlapping=overlapping(tensors))
    restoring = _Restoring(outline, notes, is_recorded=saved_mappings_of(metadata) is not None, strict=strict)
    completion = completion_of(template)
    if completion is not None:
        keys.decode_keys(saved, ())
        return dict(completion.completed(template, saved, notes)), _result(notes, tensors, keys)
    made: dict[Any, Any] = {}
    for key, value in template.items():
        below = saved_below(saved, (key,))
        if below is not None:
            keys.decode_keys(below, (text_of(key),))
            made[key] = restoring.like(below, value, (key,), in_object=False)
        elif strict and (restoring.is_recorded or not _is_empty(value)):
            # Earlier releases, and torch, leave no trace of an empty container.
            restoring.missing.append(str(key))
        else:
            made[key] = value
    restoring.raise_problems(metadata)
    return made, _result(notes, tensors, keys)


def _is_empty(value: Any) -> bool:
    return isinstance(value, (Mapping, list)) and not value


class _Restoring:
    """One walk over a template and a checkpoint's tree together, and the problems found on it."""

    def __init__(self, outline: Outline, notes: Notes, *, is_recorded: bool, strict: bool) -> None:
        self._notes = notes
        self.missing: list[str] = []
        self._outline = outline
        self.is_recorded = is_recorded
        self._strict = strict
        self._problems: list[str] = []

    def like(self, saved: Any, template: Any, path: tuple[Any, ...], *, in_object: bool) -> Any:
        """Return the dict, list or value to load into in the place of ``template``.

        Args:
            saved: What the checkpoint has at this place, see `saved_tree`.
            template: What the caller has at this place; None if nothing.
            path: The place, with the caller's keys.
            in_object: Whether the place is in the state dict of an object, which checks the loaded values itself.
        """
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
        """Raise if the template and the checkpoint do not fit.

        Raises:
            PlanError: Lists everything that does not fit.
        """
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
            assert saved.size is not None
            assert saved.dtype is not None
            if not isinstance(template, torch.Tensor):
                return torch.empty(saved.size, dtype=saved.dtype)
            dtype = dtype_of(template)
            if (not in_object or dtype == saved.dtype) and self._notes.may_fill(template, saved):
                if not torch.can_cast(saved.dtype, dtype):
                    self._problems.append(
                        f"{saved.fqn}: the checkpoint holds {saved.dtype}, which a tensor of {dtype} cannot"
                        " hold without loss"
                    )
                # The caller's tensor gives the memory and the layout.
                return template
            if not in_object and saved.size != size_of(template) and template.numel():
                self._problems.append(
                    f"Size mismatch between saved {tuple(saved.size)} and current: {tuple(size_of(template))} for"
                    f" {saved.fqn}"
                )
                return template
            return torch.empty(saved.size, dtype=saved.dtype, device=template.device)

        return like_saved(saved, template, target_of)

    def _holder(self, saved: Any, template: Any, path: tuple[Any, ...]) -> Any:
        """Give each object of a dict or list its saved state dict; a load cannot make or delete objects."""
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
        """Note the tensors of a plain dict or list that the checkpoint lacks: they would silently keep their values.

        An object finds out by itself what is missing in its state dict.
        """
        if in_object or not self._strict or not isinstance(template, (Mapping, list)):
            return
        theirs = {text_of(key) for key in (range(len(saved)) if isinstance(saved, list) else saved)}
        entries = enumerate(template) if isinstance(template, list) else template.items()
        for key, value in entries:
            if isinstance(value, torch.Tensor) and text_of(key) not in theirs:
                self.missing.append(".".join(map(str, (*path, key))))

    def _empty_like(self, saved: Mapping[Any, Any], template: Any) -> tuple[Any, dict[str, Any]]:
        """Return a new, empty mapping, and the template's keys by their strings if the checkpoint has only strings."""
        made: Any = {} if isinstance(saved, SavedOptimizerState) else _cleared(saved)
        if not isinstance(template, dict) or self.is_recorded:
            return made, {}
        # Stock torch, and earlier releases of this package, turned each key into its string.
        return _cleared(template), {str(key): key for key in template}


def _cleared(container: Any) -> Any:
    made = container.copy()
    made.clear()
    return made
