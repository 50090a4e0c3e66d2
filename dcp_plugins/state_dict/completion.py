"""Completion of optimizers' state dicts: a load reads what was saved, in the model's layout."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from dcp_plugins.errors import PlanError
from dcp_plugins.state_dict.flatten import GROUPS, PARAMS, STATE, is_nested
from dcp_plugins.state_dict.fsdp1 import FlatPiece
from dcp_plugins.state_dict.initial import mark_fresh, underlying
from dcp_plugins.state_dict.names import Names
from dcp_plugins.templates import CompletingDict, Notes, SavedOptimizerState, SavedValue, like_saved
from dcp_plugins.tensors.sharded import dtype_of

__all__ = ["OptimizerCompletion", "OptimizerStateKeys", "optimizer_template", "plain_target", "state_keys_of"]


def optimizer_template(
    values: Mapping[str, Any], optimizers: Iterable[Optimizer], names: Names, *, takes_any_form: bool
) -> dict[str, Any]:
    """Return an optimizer's state dict, nested or flat, as a template that a load completes.

    Args:
        values: The state dict that the getter made.
        optimizers: The optimizers of the state dict.
        names: The names of the model's parameters.
        takes_any_form: Complete the state dict in the form that was saved, nested or flat. If False, a load of the
            other form fails.
    """
    is_flat = not is_nested(values)
    completion = OptimizerCompletion(optimizers, names, is_flat=is_flat, takes_any_form=takes_any_form)
    if is_flat:
        completion.keys = _flat_keys_of_state(values, names.tensors)
        return CompletingDict(values, completion)
    state = values[STATE]
    completion.keys = _keys_of_state(state, names.tensors)
    return {**values, STATE: CompletingDict(state, completion, completes_parent=True)}


@dataclass(frozen=True, slots=True)
class OptimizerStateKeys:
    """The keys of an optimizer's state when the state dict was made, or, after a load, when it was saved."""

    had_state: frozenset[Any]
    """The names of the parameters that had state."""
    shared: frozenset[Any]
    """The keys that belong to no parameter."""


def state_keys_of(state_dict: Mapping[str, Any]) -> OptimizerStateKeys | None:
    """Return the keys that a state dict of this package's getters had; None for any other state dict."""
    state = state_dict.get(STATE) if isinstance(state_dict, Mapping) else None
    completion = getattr(state, "completion", None) or getattr(state_dict, "completion", None)
    return completion.keys if isinstance(completion, OptimizerCompletion) else None


class OptimizerCompletion:
    """Completes the state dict of optimizers: a load reads the saved state and options, and no others.

    New tensors of a parameter's shape get the parameter's layout; tensors of any other shape are whole on each rank.

    Args:
        optimizers: The optimizers of the state dict.
        names: The names of the model's parameters.
        is_flat: Whether the state dict is flat.
        takes_any_form: As for `optimizer_template`.
    """

    def __init__(self, optimizers: Iterable[Optimizer], names: Names, *, is_flat: bool, takes_any_form: bool) -> None:
        self.keys: OptimizerStateKeys | None = None
        self._is_flat = is_flat
        self._takes_any_form = takes_any_form
        # Weak references: a state dict that a user keeps must not keep the model in memory. Only a load needs to know
        # the parameters, so it finds them, and getters, which are called far more often, make no object for each.
        self._optimizers = [weakref.ref(underlying(optimizer)) for optimizer in optimizers]
        self._fqns: dict[int, str] = {}  # id(parameter) -> its name.
        self._spellings: dict[str, list[str]] = {}  # Name -> all names under which a state dict may know the parameter.
        self._pieces: dict[str, _Owner] = {}  # Name -> what FSDP1 leaves here of the parameter.
        for optimizer in self._optimizers:
            self._note_names(optimizer, names)

    def _note_names(self, optimizer: weakref.ref[Optimizer], names: Names) -> None:
        for parameter in _parameters_of(optimizer()):
            fqns = names.parameter_names.get(id(parameter), ())
            if not names.pieces and not names.hidden_names and len(fqns) == 1:
                self._fqns[id(parameter)] = fqns[0]  # The usual case, and there are thousands.
                continue
            for fqn in names.fqns(parameter):
                self._spellings[fqn] = names.spellings(names.tensors[fqn])
                if fqn in names.pieces:
                    self._pieces[fqn] = _Owner(names.tensors[fqn], optimizer, names.pieces[fqn])
                else:
                    self._fqns[id(parameter)] = fqn

    def _owners(self) -> dict[str, _Owner]:
        """Return the parameters that still exist, under every name that a state dict may know them by."""
        owners = dict(self._pieces)
        for optimizer in self._optimizers:
            for parameter in _parameters_of(optimizer()):
                fqn = self._fqns.get(id(parameter))
                if fqn is not None:
                    owners[fqn] = _Owner(parameter, optimizer, None)
        for fqn in self._fqns.values() - owners.keys():
            owners[fqn] = _GONE
        for fqn, spellings in self._spellings.items():
            owners.update(dict.fromkeys(spellings, owners[fqn]))
        return owners

    def completed(self, template: Mapping[Any, Any], saved: Mapping[Any, Any], notes: Notes) -> Mapping[Any, Any]:
        saved_is_flat = bool(saved) and not is_nested(saved)
        if saved and saved_is_flat != self._is_flat and not self._takes_any_form:
            # The plan of the load then fails, with a message about the two forms.
            return dict(template)
        completion = self._for_saved(saved_is_flat)
        owners = self._owners()
        if saved_is_flat:
            completion.keys, entries = _flat(template, saved, owners, notes)
            return CompletingDict(entries, completion)
        result: dict[Any, Any] = {}
        for key, value in saved.items():
            if key == STATE and isinstance(value, Mapping):
                continue
            result[key] = like_saved(value, template.get(key), plain_target)
        state = saved.get(STATE)
        own = template.get(STATE)
        state = state if isinstance(state, Mapping) else {}
        made = _nested(own if isinstance(own, Mapping) else {}, state, owners, notes)
        completion.keys = _keys_of_state(state, owners)
        result[STATE] = CompletingDict(made, completion, completes_parent=True)
        result.setdefault(GROUPS, [])
        return result

    def _for_saved(self, is_flat: bool) -> OptimizerCompletion:
        made = OptimizerCompletion.__new__(OptimizerCompletion)
        made.__dict__.update(self.__dict__)
        made._is_flat = is_flat
        return made


def _parameters_of(optimizer: Optimizer | None) -> list[torch.Tensor]:
    """Return the parameters of an optimizer; none of one that no longer exists."""
    groups = optimizer.param_groups if optimizer is not None else ()
    return [parameter for group in groups for parameter in group[PARAMS]]


def _keys_of_state(state: Mapping[Any, Any], parameters: Mapping[str, Any]) -> OptimizerStateKeys:
    """Tell which keys of a nested state dict's state name parameters."""
    had_state = frozenset(parameters.keys() & state.keys())
    return OptimizerStateKeys(had_state, frozenset(state.keys() - had_state))


def _flat_keys_of_state(values: Mapping[str, Any], parameters: Mapping[str, Any]) -> OptimizerStateKeys:
    """Tell which keys of a flat state dict's state name parameters."""
    rests = [rest for section, _, rest in (key.partition(".") for key in values) if section == STATE]
    named = {rest: _longest_name(rest, parameters) for rest in rests}
    shared = frozenset(rest.partition(".")[0] for rest, name in named.items() if name is None)
    return OptimizerStateKeys(frozenset(name for name in named.values() if name is not None), shared)


def _longest_name(rest: str, parameters: Mapping[str, Any]) -> str | None:
    """Return the parameter's name that the rest of a flat key begins with."""
    end = len(rest)
    while (end := rest.rfind(".", 0, end)) > 0:
        if rest[:end] in parameters:
            return rest[:end]
    return None


def _nested(
    template: Mapping[Any, Any], saved: Mapping[Any, Any], owners: Mapping[str, _Owner], notes: Notes
) -> dict[Any, Any]:
    """Return the state of a nested state dict as it was saved, with tensors to load into."""
    shared = saved.shared if isinstance(saved, SavedOptimizerState) else ()
    made: dict[Any, Any] = {}
    for key, value in saved.items():
        owner = owners.get(key)
        if owner is not None:
            if not owner.is_elsewhere:
                made[key] = like_saved(value, template.get(key), owner.targets(notes))
        elif str(key) in shared or key in template:
            made[key] = like_saved(value, template.get(key), plain_target)
    return made


def _flat(
    template: Mapping[Any, Any], saved: Mapping[Any, Any], owners: Mapping[str, _Owner], notes: Notes
) -> tuple[OptimizerStateKeys, dict[str, Any]]:
    """Return what names the state of a flat state dict, and its entries as they were saved, with tensors to fill."""
    listed = {key.partition(".")[2].rpartition(".")[0] for key in saved if key.startswith(f"{GROUPS}.")}
    had_state: set[str] = set()
    shared: set[str] = set()
    made: dict[str, Any] = {}
    for key, value in saved.items():
        section, _, rest = key.partition(".")
        name = _longest_name(rest, owners)
        target_of: Callable[[SavedValue, Any], torch.Tensor] = plain_target
        if section == STATE and name is not None:
            had_state.add(name)
            if owners[name].is_elsewhere:
                continue
            target_of = owners[name].targets(notes)
        elif name is None and key not in template:
            if section != STATE or any(rest.startswith(f"{fqn}.") for fqn in listed):
                continue
            # No group lists it as a parameter.
            shared.add(rest.partition(".")[0])
        made[key] = like_saved(value, template.get(key), target_of)
    return OptimizerStateKeys(frozenset(had_state), frozenset(shared)), made


class _Owner:
    """A parameter and its optimizer, which decide the layout and the dtype of the parameter's state."""

    __slots__ = ("_optimizer", "_parameter", "_piece")

    def __init__(
        self, parameter: torch.Tensor | None, optimizer: Callable[[], Optimizer | None], piece: FlatPiece | None
    ) -> None:
        self._parameter = parameter
        self._optimizer = optimizer
        self._piece = piece

    @property
    def is_elsewhere(self) -> bool:
        """Whether FSDP1 keeps no element of the parameter on this rank, and so no state of it."""
        piece = self._piece
        return piece is not None and not piece.is_whole and not piece.local().numel()

    def targets(self, notes: Notes) -> Callable[[SavedValue, Any], torch.Tensor]:
        """Return what finds the tensor to fill: the optimizer's own if a value can be loaded there, or a new one."""

        def target_of(saved: SavedValue, own: Any) -> torch.Tensor:
            made_or_own: torch.Tensor = (
                own if notes.may_fill(own, saved) and self._keeps(own, saved) else self._new(saved)
            )
            return made_or_own

        return target_of

    def _keeps(self, own: torch.Tensor, saved: SavedValue) -> bool:
        """Tell whether a value keeps its dtype in the optimizer's own tensor, or is cast as the optimizer would."""
        optimizer = self._optimizer()
        return dtype_of(own) == saved.dtype or (optimizer is not None and _is_torchs(optimizer))

    def _new(self, saved: SavedValue) -> torch.Tensor:
        assert saved.size is not None
        assert saved.dtype is not None
        parameter, optimizer = self._parameter, self._optimizer()
        if parameter is None or optimizer is None:
            raise PlanError(
                f"the layout of {saved.fqn} follows from the model and the optimizer, and one of them no longer exists:"
                " keep both until the load has ended"
            )
        made = self._allocate(parameter, saved.size, _dtype_of(saved.dtype, parameter, optimizer, saved.size))
        mark_fresh(made, optimizer)
        return made

    def _allocate(self, parameter: torch.Tensor, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        piece = self._piece
        if piece is not None:
            if size != piece.shape:
                return torch.empty(size, dtype=dtype)
            return piece.shaped(torch.empty_like(piece.local(), dtype=dtype))
        if size == parameter.shape and len(size):
            return torch.empty_like(parameter.detach(), dtype=dtype)
        return torch.empty(size, dtype=dtype)


_GONE = _Owner(None, lambda: None, None)
"""Stands for a parameter that no longer exists."""


def _dtype_of(saved: torch.dtype, parameter: torch.Tensor, optimizer: Optimizer, size: torch.Size) -> torch.dtype:
    """Return the dtype of new state: the parameter's for torch's own optimizers, the saved one for any other."""
    is_alike = (
        saved.is_floating_point == parameter.dtype.is_floating_point and size == parameter.shape and len(size) > 0
    )
    return parameter.dtype if _is_torchs(optimizer) and is_alike else saved


def _is_torchs(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim.")


def plain_target(saved: SavedValue, own: Any) -> torch.Tensor:
    """Return a new tensor for a saved value, on the device of the one that is there."""
    assert saved.size is not None
    return torch.empty(saved.size, dtype=saved.dtype, device=own.device if isinstance(own, torch.Tensor) else None)
