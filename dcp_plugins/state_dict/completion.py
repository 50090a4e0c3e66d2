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
        completion.note_flat(values)
        return CompletingDict(values, completion)
    state = values[STATE]
    completion.note(state)
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
        # `_Owner` has weak references: a state dict that a user keeps must not keep the model in memory.
        self._parameters: dict[str, _Owner] = {}
        for optimizer in optimizers:
            inner = underlying(optimizer)
            optimizer_ref = weakref.ref(inner)
            for parameter in (parameter for group in inner.param_groups for parameter in group[PARAMS]):
                for fqn in names.fqns(parameter):
                    own = _Owner(names.tensors[fqn], optimizer_ref, names.pieces.get(fqn))
                    for name in names.spellings(names.tensors[fqn]):
                        self._parameters[name] = own

    def completed(self, template: Mapping[Any, Any], saved: Mapping[Any, Any], notes: Notes) -> Mapping[Any, Any]:
        saved_is_flat = bool(saved) and not is_nested(saved)
        if saved and saved_is_flat != self._is_flat and not self._takes_any_form:
            # The plan of the load then fails, with a message about the two forms.
            return dict(template)
        completion = self._for_saved(saved_is_flat)
        if saved_is_flat:
            made = {
                key: value for key, value in self._flat(template, saved, completion, notes) if value is not _ELSEWHERE
            }
            return CompletingDict(made, completion)
        result: dict[Any, Any] = {}
        for key, value in saved.items():
            if key == STATE and isinstance(value, Mapping):
                continue
            result[key] = like_saved(value, template.get(key), _plain_target)
        state = saved.get(STATE)
        own = template.get(STATE)
        made = self._state(own if isinstance(own, Mapping) else {}, state, notes) if isinstance(state, Mapping) else {}
        completion.note(state if isinstance(state, Mapping) else {})
        result[STATE] = CompletingDict(made, completion, completes_parent=True)
        result.setdefault(GROUPS, [])
        return result

    def note(self, state: Mapping[Any, Any]) -> None:
        """Remember the keys of the state that the state dict has."""
        shared = frozenset(key for key in state if key not in self._parameters)
        self.keys = OptimizerStateKeys(frozenset(state) - shared, shared)

    def note_flat(self, values: Mapping[str, Any]) -> None:
        """Remember the keys of the state that a flat state dict has."""
        rests = [rest for section, _, rest in (key.partition(".") for key in values) if section == STATE]
        named = {rest: self._longest_name(rest) for rest in rests}
        shared = frozenset(rest.partition(".")[0] for rest, name in named.items() if name is None)
        self.keys = OptimizerStateKeys(frozenset(name for name in named.values() if name is not None), shared)

    def _for_saved(self, is_flat: bool) -> OptimizerCompletion:
        made = OptimizerCompletion.__new__(OptimizerCompletion)
        made.__dict__.update(self.__dict__)
        made._is_flat = is_flat
        return made

    def _state(self, template: Mapping[Any, Any], saved: Mapping[Any, Any], notes: Notes) -> dict[Any, Any]:
        shared = saved.shared if isinstance(saved, SavedOptimizerState) else ()
        made: dict[Any, Any] = {}
        for key, value in saved.items():
            owner = self._parameters.get(key)
            if owner is not None:
                if owner.is_elsewhere:
                    continue
                made[key] = like_saved(value, template.get(key), owner.targets(notes))
            elif str(key) in shared or key in template:
                made[key] = like_saved(value, template.get(key), _plain_target)
        return made

    def _flat(
        self, template: Mapping[Any, Any], saved: Mapping[Any, Any], completion: OptimizerCompletion, notes: Notes
    ) -> Iterable[tuple[str, Any]]:
        listed = {key.partition(".")[2].rpartition(".")[0] for key in saved if key.startswith(f"{GROUPS}.")}
        had_state: set[str] = set()
        shared: set[str] = set()
        for key, value in saved.items():
            section, _, rest = key.partition(".")
            own = template.get(key)
            name = self._longest_name(rest)
            if section == STATE and name is not None:
                had_state.add(name)
                owner = self._parameters[name]
                yield key, _ELSEWHERE if owner.is_elsewhere else like_saved(value, own, owner.targets(notes))
            elif name is not None or key in template:
                yield key, like_saved(value, own, _plain_target)
            elif section == STATE and not any(rest.startswith(f"{fqn}.") for fqn in listed):
                # No group lists it as a parameter.
                shared.add(rest.partition(".")[0])
                yield key, like_saved(value, own, _plain_target)
        completion.keys = OptimizerStateKeys(frozenset(had_state), frozenset(shared))

    def _longest_name(self, rest: str) -> str | None:
        end = len(rest)
        while (end := rest.rfind(".", 0, end)) > 0:
            if rest[:end] in self._parameters:
                return rest[:end]
        return None


_ELSEWHERE = object()
"""Stands for state of a parameter of which this rank keeps no element."""


class _Owner:
    """A parameter and its optimizer, which decide the layout and the dtype of the parameter's state."""

    __slots__ = ("_optimizer", "_parameter", "_piece")

    def __init__(self, parameter: torch.Tensor, optimizer: weakref.ref[Optimizer], piece: FlatPiece | None) -> None:
        self._parameter = weakref.ref(parameter) if piece is None else (lambda: parameter)
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
        parameter, optimizer = self._parameter(), self._optimizer()
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
