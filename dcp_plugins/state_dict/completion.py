"""Completion of models' and optimizers' state dicts: a load reads what was saved, in the model's layout."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dcp_plugins.errors import PlanError, listing
from dcp_plugins.format.memory import PLAIN_TENSORS
from dcp_plugins.state_dict.fit import keeps_sizes
from dcp_plugins.state_dict.flatten import GROUPS, PARAMS, STATE, is_nested
from dcp_plugins.state_dict.fsdp1 import FlatPiece
from dcp_plugins.state_dict.initial import mark_fresh, underlying
from dcp_plugins.state_dict.keys import is_extra_state, keeps_keys, self_loading
from dcp_plugins.state_dict.names import Names
from dcp_plugins.templates import CompletingDict, Notes, SavedOptimizerState, SavedValue, like_saved, saved_values
from dcp_plugins.tensors.sharded import dtype_of, size_of

__all__ = ["OptimizerCompletion", "OptimizerStateKeys", "model_template", "optimizer_template", "state_keys_of"]


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
            result[key] = like_saved(value, template.get(key), _plain_target)
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
            made[key] = like_saved(value, template.get(key), _plain_target)
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
        target_of: Callable[[SavedValue, Any], torch.Tensor] = _plain_target
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


def _plain_target(saved: SavedValue, own: Any) -> torch.Tensor:
    assert saved.size is not None
    return torch.empty(saved.size, dtype=saved.dtype, device=own.device if isinstance(own, torch.Tensor) else None)


def model_template(
    values: Mapping[str, Any], names: Names, *, strict: bool, hint: str, title: str = ""
) -> dict[str, Any]:
    """Return a model's state dict as a template that a load completes: extra state and lazy parameters are loaded too.

    Args:
        values: The state dict that the getter made, or a part of it.
        names: The names of the model's parameters.
        strict: Raise if the model's keys and the checkpoint's differ, before anything is read; otherwise load the keys
            that both have, and those of modules that load their part themselves.
        hint: The last sentence of that error: what the caller can do.
        title: The name of the model in that error, where there are several.
    """
    template = CompletingDict(values, _ModelCompletion(names, strict=strict, hint=hint, title=title))
    template.__dict__.update(vars(values) if isinstance(values, OrderedDict) else {})
    return template


class _ModelCompletion:
    """Completes the state dict of a model."""

    def __init__(self, names: Names, *, strict: bool, hint: str, title: str) -> None:
        self._names = names
        self._strict = strict
        self._hint = hint
        self._of = f" of {title}" if title else ""

    def completed(self, template: Mapping[Any, Any], saved: Mapping[Any, Any], notes: Notes) -> Mapping[Any, Any]:
        missing = [key for key in template if key not in saved and not is_extra_state(key)]
        unexpected = [key for key in saved if key not in template]
        problems = []
        # A module that loads its part itself gets the keys that it does not have now, as from ``load_state_dict``.
        free = self_loading(self._names, keeps_keys) if missing or unexpected else ()
        if self._strict and (missing or unexpected):
            for what, keys in (("Missing", missing), ("Unexpected", unexpected)):
                wrong = [key for key in keys if not key.startswith(free)]
                if wrong:
                    problems.append(f"{what} key(s){self._of}: {listing(wrong)}")
        tied = _earlier_tied(template, saved)
        made: OrderedDict[Any, Any] = OrderedDict()
        versions = getattr(template, "_metadata", None)
        if versions is not None:
            # The modules' versions: ``Module.load_state_dict`` reads this attribute.
            made._metadata = versions  # type: ignore[attr-defined]
        misfits: list[str] = []
        self_deciding = self_loading(self._names, keeps_sizes)
        for key, value in saved.items():
            if key in tied:
                # One memory under several names: as in ``load_state_dict``, the last one's value counts.
                notes.left_unread.update(found.fqn for found in saved_values(value))
            elif key in template:
                target_of = self._target_for(key, misfits, decides_itself=key.startswith(self_deciding))
                made[key] = like_saved(value, template[key], target_of)
            elif self._strict or key.startswith(free):
                made[key] = like_saved(value, None, _plain_target)
            else:
                notes.left_unread.update(found.fqn for found in saved_values(value))
        problems += misfits
        if problems:
            raise PlanError(f"The model and the checkpoint do not fit: {'. '.join(problems)}. {self._hint}")
        return made

    def _target_for(
        self, key: str, misfits: list[str], *, decides_itself: bool
    ) -> Callable[[SavedValue, Any], torch.Tensor]:
        """Return a function that finds the tensor to fill: the model's own, unless the module decides what it takes.

        Such a module may skip a key or convert a value when it loads, so a read must not change its own tensors.
        """

        def target_of(saved: SavedValue, own: Any) -> torch.Tensor:
            if not isinstance(own, torch.Tensor) or is_lazy(own):
                return torch.empty(saved.size or (), dtype=saved.dtype)
            if size_of(own) == saved.size:
                if not decides_itself or isinstance(own, ShardedTensor) or is_extra_state(key):
                    return own
                return torch.empty_like(own.detach(), dtype=saved.dtype)
            may_differ = is_extra_state(key) or decides_itself
            is_scalar = own.dim() == 0 and saved.size is not None and len(saved.size) == 1
            if may_differ or is_scalar:
                return _plain_target(saved, own)
            misfits.append(
                f"Size mismatch between saved {tuple(saved.size or ())} and current: {tuple(size_of(own))} for {key}"
            )
            return own

        return target_of


def _earlier_tied(template: Mapping[Any, Any], saved: Mapping[Any, Any]) -> set[Any]:
    """Return the names of a model's tensors whose memory has another name later on that was saved, too."""
    last: dict[tuple[int, torch.Size], Any] = {}
    earlier: set[Any] = set()
    for key, value in template.items():
        local = getattr(value, "_local_tensor", value)
        if key not in saved or type(local) not in PLAIN_TENSORS or local.is_meta or not local.numel():
            continue
        place = (local.data_ptr(), local.shape)
        if place in last:
            earlier.add(last[place])
        last[place] = key
    return earlier
