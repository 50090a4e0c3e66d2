"""Setting the state of optimizers from a state dict keyed by the canonical names of the parameters.

Parameters find their state, and groups their options, by name: the order of groups, and which parameters share one, may
have changed. Tensors are copied into the optimizer's own where it has any; nothing of the caller's is held afterwards,
except tensors that ``get_optimizer_state_dict`` made for this very optimizer to load into.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dcp_plugins.errors import PlanError, listing
from dcp_plugins.events import record
from dcp_plugins.state_dict.completion import state_keys_of
from dcp_plugins.state_dict.fill import memory_of_class
from dcp_plugins.state_dict.fit import landed
from dcp_plugins.state_dict.flatten import PARAMS, ParsedGroup, ParsedOptimizerState, parsed
from dcp_plugins.state_dict.fsdp1 import FlatPiece, flat_memory
from dcp_plugins.state_dict.full import Announced, Copy, agree, announce, fill_all, is_tensor_source, receive
from dcp_plugins.state_dict.initial import has_state, initial_state, is_fresh, underlying
from dcp_plugins.state_dict.names import Names
from dcp_plugins.state_dict.optimizer import check_membership, entries_of
from dcp_plugins.state_dict.optimizer_class import mismatch_of_class
from dcp_plugins.state_dict.optimizer_fsdp1 import is_memory_of, merge, piece_copy
from dcp_plugins.state_dict.optimizer_install import install
from dcp_plugins.state_dict.optimizer_names import by_fqn, check_real
from dcp_plugins.state_dict.optimizer_shared import shared_state
from dcp_plugins.state_dict.options import StateDictOptions
from dcp_plugins.state_dict.problems import EmptyGroups, Problems, spellings
from dcp_plugins.state_dict.together import optimizer_pairs, settled
from dcp_plugins.state_dict.values import copied, equal, of_its_kind, renamed
from dcp_plugins.tensors.sharded import dtype_of, size_of

__all__ = ["load_optimizers"]

# The names of the parameters as the optimizer's maker gave them: part of the optimizer, not of its state.
_OWN_OPTIONS = (PARAMS, "param_names")


@torch.no_grad()
def load_optimizers(
    optimizers: tuple[Optimizer, ...],
    state_dict: Mapping[str, Any],
    names: Names,
    options: StateDictOptions,
    *,
    may_step_replica: bool = True,
) -> None:
    """Load a state dict, nested or flat, into the optimizers; the dict is left as it is.

    With ``strict`` unset, parameters and groups that the state dict does not know keep what they have.

    Args:
        optimizers: The optimizers to load into.
        state_dict: Keyed by the names of the parameters.
        names: The names of the model's parameters.
        options: How to load.
        may_step_replica: Whether a step of a copy of the optimizer may find the layout of state that does not exist
            yet. If False, such state gets the layout of its parameter, or the one that it was saved with.

    Raises:
        PlanError: (a RuntimeError) Parameters are missing, sizes differ, or one group would get several values for an
            option. Nothing has been changed then.
    """

    def check() -> None:
        check_membership(optimizers, names)
        check_real(optimizers, names)

    def read() -> ParsedOptimizerState:
        check()
        saved = parsed(by_fqn(state_dict, optimizers, names), spellings(names))
        keys = state_keys_of(state_dict)
        if keys is not None:
            saved.had_state, saved.shared = keys.had_state, keys.shared
        return saved

    plans: list[_Plan] = []

    def plan(saved: ParsedOptimizerState) -> None:
        _plan_all(optimizers, saved, names, options, plans, may_step_replica)

    def pairs() -> Iterable[tuple[torch.Tensor, Any]]:
        copies = [(copy.target, copy.source) for each in plans for copy in each.copies]
        return copies if plans else optimizer_pairs(state_dict, names)

    if options.broadcast_from_rank0:
        tree, tensors = announce(lambda: _as_tree(read()))
        saved = ParsedOptimizerState(
            tree[0], [ParsedGroup(params, own.options) for params, own in tree[1]], tree[2], tree[3]
        )
        agree(check)
        agree(lambda: plan(saved))
        receive(tree, tensors, [copy for each in plans for copy in each.copies])
    else:
        with record("state_dict.plan"):
            settled(lambda: plan(read()), pairs)

    def install_all() -> None:
        # Before any optimizer takes its state, which may fail: it is collective where layouts differ.
        fill_all(copy for each in plans for copy in each.copies)
        for each in plans:
            with record("state_dict.call"):
                each.install()

    if options.broadcast_from_rank0:
        agree(install_all)
    else:
        install_all()


@dataclass(frozen=True, slots=True)
class _Options:
    """A group's options, sent as they are: they are compared before tensors arrive, and small."""

    options: dict[str, Any]


def _as_tree(saved: ParsedOptimizerState) -> list[Any]:
    groups = [[group.params, _Options(copied(group.options, torch.device("cpu")))] for group in saved.groups]
    return [saved.state, groups, saved.is_flat, saved.unknown]


def _plan_all(
    optimizers: tuple[Optimizer, ...],
    saved: ParsedOptimizerState,
    names: Names,
    options: StateDictOptions,
    plans: list[_Plan],
    may_step_replica: bool,
) -> None:
    """Add a plan for each optimizer to ``plans``, those that do not fit too; then raise what is wrong with them."""
    problems = Problems(saved, names)
    if options.strict:
        problems.compare_groups(optimizers, names)
    empty_groups = EmptyGroups(optimizers, saved)
    plans.extend(
        _Plan(optimizer, saved, names, options, problems, empty_groups, may_step_replica) for optimizer in optimizers
    )
    for at, each in enumerate(plans):
        each.entries = copied(entries_of(saved.entries, at, len(optimizers)))
    for at, key, value in shared_state(optimizers, saved, names, problems, strict=options.strict):
        plans[at].place(key, value)
    problems.raise_any()
    problems.report(may_warn=may_step_replica)


class _Plan:
    """The new state of one optimizer. Making the plan changes nothing."""

    def __init__(
        self,
        optimizer: Optimizer,
        saved: ParsedOptimizerState,
        names: Names,
        options: StateDictOptions,
        problems: Problems,
        empty_groups: EmptyGroups,
        may_step_replica: bool,
    ) -> None:
        self.copies: list[Copy] = []
        self.entries: dict[str, Any] = {}
        self._optimizer = optimizer
        self._full = options.full_state_dict
        self._strict = options.strict
        self._names = names
        self._problems = problems
        self._initial: dict[int, dict[str, Any]] | None = None if may_step_replica else {}
        # An owner gets a number back as a number, whatever its optimizer has now.
        self._may_convert = may_step_replica
        groups_of: dict[str, int] = {fqn: at for at, group in enumerate(saved.groups) for fqn in group.params}
        self._state: dict[Any, Any] = {}
        self._groups: list[dict[str, Any]] = []
        number = 0
        for at, group in enumerate(optimizer.param_groups):
            sources: dict[int, str] = {}
            numbers = []
            for parameter in group[PARAMS]:
                spelled = [self._spelled(fqn, saved, groups_of) for fqn in names.fqns(parameter)]
                if self._strict and groups_of:
                    problems.ungrouped.extend(fqn for fqn in spelled if fqn in saved.state and fqn not in groups_of)
                for fqn in spelled:
                    if fqn in groups_of:
                        sources.setdefault(groups_of[fqn], fqn)
                if id(parameter) in names.flats:
                    state = self._flat_state_for(parameter, spelled, saved, groups_of)
                else:
                    state = self._state_for(parameter, spelled[0], saved, spelled[0] in groups_of)
                if state is not None:
                    self._state[number] = state
                numbers.append(number)
                number += 1
            merged = self._merged_options([saved.groups[index] for index in sources], at)
            if merged and self._strict and not may_step_replica:
                problems.note_class(mismatch_of_class(optimizer, merged))
            if not group[PARAMS]:
                merged = empty_groups.next_options()
            own = {option: value for option, value in group.items() if option != PARAMS}
            if merged and not may_step_replica and has_state(optimizer):
                # Options that steps have made since the save go, as in ``Optimizer.load_state_dict``.
                defaults = getattr(underlying(optimizer), "defaults", own)  # A wrapper may have none.
                own = {option: value for option, value in own.items() if option in defaults}
            new = {
                option: copied(value, getattr(own.get(option), "device", None))
                for option, value in merged.items()
                if option not in _OWN_OPTIONS
            }
            if merged:
                problems.kept.update(own.keys() - new.keys() - set(_OWN_OPTIONS))
            self._groups.append({**own, **new, PARAMS: numbers})

    def place(self, key: Any, value: Any) -> None:
        """Add state that belongs to no parameter."""
        self._state[key] = landed(str(key), copied(value), self.copies)

    def install(self) -> None:
        """Give the optimizer its state."""
        install(self._optimizer, self._state, self._groups, self.entries)

    def _merged_options(self, groups: list[ParsedGroup], at: int) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        conflicts = []
        for group in groups:
            for option, value in group.options.items():
                if option in _OWN_OPTIONS:
                    continue
                if option not in merged:
                    merged[option] = value
                elif not equal(merged[option], value):
                    conflicts.append(f"'{option}' ({merged[option]} for some, {value} for others)")
        if conflicts and self._strict:
            self._problems.note_groups(
                f"The parameters of group {at} of {type(self._optimizer).__name__} were saved in groups with different "
                f"options: {listing(sorted(set(conflicts)))}. Group them as they were."
            )
        return merged

    def _spelled(self, fqn: str, saved: ParsedOptimizerState, groups_of: Mapping[str, int]) -> str:
        """Return the name under which the state dict knows a parameter, or its own if it does not."""
        spellings = self._names.spellings(self._names.tensors[fqn])
        return next((name for name in spellings if name in groups_of or name in saved.state), fqn)

    def _flat_state_for(
        self, parameter: torch.Tensor, spelled: list[str], saved: ParsedOptimizerState, groups_of: Mapping[str, int]
    ) -> dict[Any, Any] | None:
        own = underlying(self._optimizer).state.get(parameter) or {}
        states = {fqn: saved.state[fqn] for fqn in spelled if isinstance(saved.state.get(fqn), Mapping)}
        unknown = [fqn for fqn in spelled if fqn not in groups_of and fqn not in saved.state]
        if unknown and self._strict and parameter.requires_grad:
            self._problems.missing.extend(unknown)
        if not states:
            return dict(own) if own and (unknown or not self._strict) else None
        fqns = self._names.flats[id(parameter)]
        pieces = [(name, self._names.pieces[fqn]) for name, fqn in zip(spelled, fqns, strict=True)]
        if saved.is_flat:
            states = {fqn: self._as_own(parameter, each, own) for fqn, each in states.items()}
        merged = merge(pieces, states, own, self._optimizer, set(spelled) - set(unknown), full=self._full)
        self.copies.extend(merged.copies)
        self._problems.others.extend(merged.problems)
        result: dict[Any, Any] = dict(merged.tensors)
        for key, value in merged.shared.items():
            result[key] = self._value_for(parameter, f"{spelled[0]}.{key}", key, value, own.get(key))
        return result

    def _as_own(self, parameter: torch.Tensor, flat: Mapping[str, Any], own: Mapping[Any, Any]) -> dict[Any, Any]:
        """Return what a flat state dict has of a parameter under the optimizer's own keys."""
        if not own and any(isinstance(value, Mapping) for value in flat.values()):
            own = self._initial_state(parameter)
        return dict(renamed(flat, own))

    def _state_for(
        self, parameter: torch.Tensor, fqn: str, saved: ParsedOptimizerState, is_listed: bool
    ) -> dict[Any, Any] | None:
        own = underlying(self._optimizer).state.get(parameter) or {}
        if fqn not in saved.state:
            if not is_listed and self._strict and parameter.requires_grad:
                self._problems.missing.append(fqn)
            elif is_listed and self._strict and parameter.requires_grad and parameter.numel():
                self._problems.lacks_state(fqn, has_own=bool(own))
            # Saved without state, a parameter had not been stepped; unknown, it keeps what it has.
            return dict(own) if own and (not is_listed or not self._strict) else None
        theirs = saved.state[fqn]
        if not isinstance(theirs, Mapping):
            return dict(own) if own else None
        if saved.is_flat:
            theirs = self._as_own(parameter, theirs, own)
        return {
            key: self._value_for(parameter, f"{fqn}.{key}", key, value, own.get(key)) for key, value in theirs.items()
        }

    def _value_for(self, parameter: torch.Tensor, path: str, key: Any, value: Any, own: Any, top: bool = True) -> Any:
        if is_tensor_source(value):
            return self._target_for(parameter, path, key, value, own, top)
        if isinstance(value, Mapping):
            own = own if isinstance(own, dict) else {}
            return of_its_kind(
                value,
                lambda name, element: self._value_for(
                    parameter, f"{path}.{name}", key, element, own.get(name), top=False
                ),
            )
        if type(value) in (list, tuple):
            owns = own if isinstance(own, list | tuple) and len(own) == len(value) else [None] * len(value)
            return type(value)(
                self._value_for(parameter, f"{path}.{at}", key, element, owns[at], top=False)
                for at, element in enumerate(value)
            )
        is_number = isinstance(value, int | float) and self._may_convert
        if is_number and isinstance(own, torch.Tensor) and own.dim() == 0:
            return torch.full_like(own, value)
        return value

    def _target_for(
        self, parameter: torch.Tensor, path: str, key: Any, value: Any, own: Any, top: bool
    ) -> torch.Tensor | int | float:
        if value is own or (isinstance(value, torch.Tensor) and is_fresh(value, self._optimizer)):
            tensor: torch.Tensor = value
            return tensor
        if not isinstance(own, torch.Tensor) and isinstance(own, int | float) and not value.shape:
            number: int | float = type(own)(value.item())
            return number
        if type(own) is type(value) and value is not own and not self._names.pieces and own.shape == value.shape:
            # The usual case, and there are thousands: its own memory, and nothing to find out.
            self.copies.append(Copy(path, own, value))
            kept: torch.Tensor = own
            return kept
        piece = self._names.pieces.get(self._names.fqns(parameter)[0])
        if piece is not None and piece.is_original and (size_of(value) == piece.shape or piece.holds(own)):
            return self._piece_target(piece, path, value, own)
        expected = own if isinstance(own, torch.Tensor) else None
        if expected is not None and expected.shape not in (value.shape, parameter.shape):
            expected = None  # State that changes its size as the optimizer goes: replaced.
        elif expected is None and top and (dtype_of(value) != parameter.dtype or _has_own_layout(value, parameter)):
            expected = self._initial_value(parameter, key)
        if expected is not None and expected.shape != value.shape:
            self._problems.others.append(
                f"size mismatch for the state {path}: found {tuple(value.shape)}, expected {tuple(expected.shape)}."
            )
            return expected
        like_parameter = parameter if len(value.shape) and value.shape == parameter.shape else None
        sharded = expected if expected is not None else like_parameter
        if isinstance(sharded, DTensor) and not isinstance(value, DTensor) and not self._full:
            self._problems.others.append(
                f"Expected a DTensor for the state {path} of a sharded parameter, found a plain tensor. If it is "
                "whole, pass StateDictOptions(full_state_dict=True)."
            )
            return sharded
        if isinstance(value, DTensor) and sharded is not None and not isinstance(sharded, DTensor):
            self._problems.others.append(
                f"Expected a plain tensor for the state {path}, found a DTensor. Get the state dict with "
                "StateDictOptions(full_state_dict=True), or load the checkpoint into this optimizer's own state dict."
            )
            return sharded
        target = self._memory_for(parameter, value, expected)
        self.copies.append(Copy(path, target, value))
        return target

    def _piece_target(self, piece: FlatPiece, path: str, value: torch.Tensor | Announced, own: Any) -> torch.Tensor:
        if size_of(value) != piece.shape:
            self._problems.others.append(
                f"size mismatch for the state {path}: found {tuple(size_of(value))}, expected {tuple(piece.shape)}."
            )
            return piece.parameter
        memory = flat_memory(value)
        if memory is not None and (is_fresh(memory, self._optimizer) or is_memory_of(memory, own)):
            return memory
        local = own if piece.holds(own) else self._memory_like(piece.parameter, dtype_of(value))
        copy = piece_copy(piece, path, local, value, full=self._full)
        if isinstance(copy, Copy):
            self.copies.append(copy)
        else:
            self._problems.others.append(copy)
        return local

    def _memory_for(
        self, parameter: torch.Tensor, value: torch.Tensor | Announced, expected: torch.Tensor | None
    ) -> torch.Tensor:
        if expected is not None:
            # Its own memory: no more is needed, and captured graphs keep their addresses.
            return expected
        if isinstance(value, torch.Tensor) and (of_class := memory_of_class(value, parameter.device)) is not None:
            return of_class
        if value.shape == parameter.shape and len(value.shape):
            return self._memory_like(parameter, value.dtype)
        if isinstance(value, torch.Tensor):
            return torch.empty_like(value.detach())
        return torch.empty(value.shape, dtype=value.dtype, device=parameter.device)

    @staticmethod
    def _memory_like(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        fits = dtype.is_floating_point == parameter.dtype.is_floating_point
        # The dtype that Optimizer.load_state_dict would convert it to.
        return torch.empty_like(parameter.detach(), dtype=parameter.dtype if fits else dtype)

    def _initial_value(self, parameter: torch.Tensor, key: Any) -> torch.Tensor | None:
        """Return what the optimizer would begin with; asked for only where the parameter does not tell the layout."""
        found = self._initial_state(parameter).get(key)
        return found if isinstance(found, torch.Tensor) else None

    def _initial_state(self, parameter: torch.Tensor) -> dict[Any, Any]:
        if self._initial is None:
            try:
                self._initial = initial_state(self._optimizer)
            except PlanError:
                self._initial = {}
        return self._initial.get(id(parameter), {})


def _has_own_layout(value: torch.Tensor | Announced, parameter: torch.Tensor) -> bool:
    """Tell whether state is laid out otherwise than its parameter, or may be: scalars of scalar DTensors."""
    if len(value.shape) == 0:
        return isinstance(parameter, DTensor) and parameter.dim() == 0
    return value.shape != parameter.shape
