"""Setting the state of optimizers from a state dict keyed by the canonical names of the parameters.

Parameters find their state, and groups their options, by name: the order of groups, and which parameters share one, may
have changed. Tensors are copied into the optimizer's own where it has any; nothing of the caller's is held afterwards,
except tensors that ``get_optimizer_state_dict`` made for this very optimizer to load into.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dcp_plugins.errors import PlanError, listing
from dcp_plugins.state_dict.flatten import GROUPS, PARAMS, STATE, SavedGroup, SavedState, parsed
from dcp_plugins.state_dict.full import Announced, Copy, agree, announce, fill, is_tensor_source, receive
from dcp_plugins.state_dict.initial import initial_state, is_fresh, underlying
from dcp_plugins.state_dict.model import suggestion
from dcp_plugins.state_dict.names import Names, state_dict_call
from dcp_plugins.state_dict.optimizer import check_membership
from dcp_plugins.state_dict.options import StateDictOptions

__all__ = ["load_optimizers"]

# The names of the parameters as the optimizer's maker gave them: part of the optimizer, not of its state.
_OWN_OPTIONS = (PARAMS, "param_names")


@torch.no_grad()
def load_optimizers(
    optimizers: tuple[Optimizer, ...], state_dict: Mapping[str, Any], names: Names, options: StateDictOptions
) -> None:
    """Load a state dict, nested or flat, into the optimizers; the dict is left as it is.

    With ``strict`` unset, parameters and groups that the state dict does not know keep what they have.

    Raises:
        PlanError: (a RuntimeError) Parameters are missing, sizes differ, or one group would get several values for an
            option. Nothing has been changed then.
    """
    check_membership(optimizers, names)
    on_meta = [fqn for fqn in _all_fqns(optimizers, names) if names.tensors[fqn].is_meta]
    if on_meta:
        raise PlanError(
            f"Cannot load optimizer state for parameters on the meta device: {listing(on_meta)}. Load the model first, "
            "then make the optimizer over its real parameters."
        )

    def read() -> SavedState:
        return parsed(_by_fqn(state_dict, optimizers, names), _spellings(names))

    tensors: list[torch.Tensor] = []
    if options.broadcast_from_rank0:
        tree, tensors = announce(lambda: _as_tree(read()))
        saved = SavedState(tree[0], [SavedGroup(params, own) for params, own in tree[1]], tree[2], tree[3])
        plans = agree(lambda: _planned(optimizers, saved, names, options))
        receive(tree, tensors, [copy for plan in plans for copy in plan.copies])
    else:
        plans = _planned(optimizers, read(), names, options)
    for plan in plans:
        for copy in plan.copies:
            if isinstance(copy.source, torch.Tensor):
                fill(copy.fqn, copy.target, copy.source)
        plan.install()


def _as_tree(saved: SavedState) -> list[Any]:
    return [saved.state, [[group.params, group.options] for group in saved.groups], saved.is_flat, saved.unknown]


def _all_fqns(optimizers: Iterable[Optimizer], names: Names) -> list[str]:
    return [
        names.parameter_names[id(parameter)][0]
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group[PARAMS]
    ]


def _spellings(names: Names) -> dict[str, None]:
    hidden = {name: None for spellings in names.hidden_names.values() for name in spellings}
    return {**dict.fromkeys(names.tensors), **hidden}


def _by_fqn(state_dict: Mapping[str, Any], optimizers: tuple[Optimizer, ...], names: Names) -> Mapping[str, Any]:
    """Translate ``Optimizer.state_dict()``'s own form, keyed by numbers, for a single optimizer."""
    groups = state_dict.get(GROUPS) if isinstance(state_dict, Mapping) else None
    params = [param for group in groups or () for param in group.get(PARAMS, ())]
    if groups is None or not params or not all(isinstance(param, int) for param in params):
        return state_dict
    own = _all_fqns(optimizers, names)
    if len(optimizers) != 1 or len(own) != len(params):
        raise PlanError(
            f"Expected optimizer state keyed by parameter names, found numbers. Numbers are understood for one "
            f"optimizer with as many parameters: found {len(optimizers)} optimizer(s) with {len(own)} parameters and "
            f"state for {len(params)}."
        )
    fqns = dict(zip(params, own, strict=True))
    return {
        STATE: {fqns.get(key, key): value for key, value in state_dict[STATE].items()},
        GROUPS: [{**group, PARAMS: [fqns[param] for param in group[PARAMS]]} for group in groups],
    }


def _planned(
    optimizers: tuple[Optimizer, ...], saved: SavedState, names: Names, options: StateDictOptions
) -> list[_Plan]:
    problems = _Problems(saved)
    empty_groups = _EmptyGroups(optimizers, saved)
    plans = [_Plan(optimizer, saved, names, options, problems, empty_groups) for optimizer in optimizers]
    problems.raise_any()
    return plans


class _Problems:
    """Everything that is wrong, to be told at once."""

    def __init__(self, saved: SavedState) -> None:
        self.missing: list[str] = []
        self.losing: list[str] = []
        self.others: list[str] = []
        self._known = [*(key for key in saved.state if isinstance(key, str)), *saved.unknown]

    def raise_any(self) -> None:
        """Raise if there is anything to tell."""
        lines = []
        if self.missing:
            shown = [f'"{fqn}"{suggestion(fqn, self._known)}' for fqn in sorted(self.missing)[:12]]
            rest = len(self.missing) - len(shown)
            lines.append(
                f"Missing optimizer state for parameter(s) {', '.join(shown)}{f', ... ({rest} more)' if rest else ''}: "
                "in no parameter group of the state dict."
            )
        if self.losing:
            lines.append(
                f"Missing optimizer state for parameter(s) {listing(self.losing)}: the state dict has none, and the "
                "optimizer's own would be lost."
            )
        lines.extend(self.others[:12])
        if len(self.others) > 12:
            lines.append(f"... ({len(self.others) - 12} more)")
        if lines:
            if self.missing or self.losing:
                lines.append("To load what is there and keep the rest, pass StateDictOptions(strict=False).")
            raise PlanError("\n    ".join(["The optimizer state dict does not fit:", *lines]))


class _EmptyGroups:
    """Pairs groups without parameters by order, as they have no names to pair them by."""

    def __init__(self, optimizers: tuple[Optimizer, ...], saved: SavedState) -> None:
        theirs = [group.options for group in saved.groups if not group.params]
        count = sum(not group[PARAMS] for optimizer in optimizers for group in optimizer.param_groups)
        # Another number of them: which is which cannot be told, and each keeps its own options.
        self._theirs = iter(theirs if len(theirs) == count else ())

    def next_options(self) -> dict[str, Any]:
        """Return the saved options of the next group without parameters."""
        return next(self._theirs, {})


class _Plan:
    """What one optimizer will get. Making it changes nothing."""

    def __init__(
        self,
        optimizer: Optimizer,
        saved: SavedState,
        names: Names,
        options: StateDictOptions,
        problems: _Problems,
        empty_groups: _EmptyGroups,
    ) -> None:
        self.copies: list[Copy] = []
        self._optimizer = optimizer
        self._full = options.full_state_dict
        self._strict = options.strict
        self._problems = problems
        self._initial: dict[int, dict[str, Any]] | None = None
        self._strings: list[tuple[torch.Tensor, str, Any]] = []
        groups_of: dict[str, int] = {fqn: at for at, group in enumerate(saved.groups) for fqn in group.params}
        self._state: dict[Any, Any] = {}
        self._groups: list[dict[str, Any]] = []
        number = 0
        for at, group in enumerate(optimizer.param_groups):
            sources: dict[int, str] = {}
            numbers = []
            for parameter in group[PARAMS]:
                fqn = next(
                    (name for name in names.spellings(parameter) if name in groups_of or name in saved.state),
                    names.parameter_names[id(parameter)][0],
                )
                if fqn in groups_of:
                    sources.setdefault(groups_of[fqn], fqn)
                state = self._state_for(parameter, fqn, saved, fqn in groups_of)
                if state is not None:
                    self._state[number] = state
                numbers.append(number)
                number += 1
            merged = self._merged_options([saved.groups[index] for index in sources], at)
            if not group[PARAMS]:
                merged = empty_groups.next_options()
            own = {option: value for option, value in group.items() if option != PARAMS}
            new = {option: _copied(value) for option, value in merged.items() if option not in _OWN_OPTIONS}
            self._groups.append({**own, **new, PARAMS: numbers})
        for key, value in saved.state.items():
            if key in optimizer.state and key not in groups_of:
                self._state[key] = _copied(value)

    def install(self) -> None:
        """Give the optimizer its state, through its own ``load_state_dict``."""
        state_dict_call(self._optimizer, "load_state_dict")({STATE: self._state, GROUPS: self._groups})
        for parameter, name, value in self._strings:
            # torch.optim takes a str for an iterable of values to convert, and spoils it.
            self._optimizer.state[parameter][name] = value

    def _merged_options(self, groups: list[SavedGroup], at: int) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        conflicts = []
        for group in groups:
            for option, value in group.options.items():
                if option in _OWN_OPTIONS:
                    continue
                if option not in merged:
                    merged[option] = value
                elif not _equal(merged[option], value):
                    conflicts.append(f"'{option}' ({merged[option]} for some, {value} for others)")
        if conflicts and self._strict:
            self._problems.others.append(
                f"The parameters of group {at} of {type(self._optimizer).__name__} were saved in groups with different "
                f"options: {listing(sorted(set(conflicts)))}. Group them as they were, or pass "
                "StateDictOptions(strict=False) to take the first."
            )
        return merged

    def _state_for(
        self, parameter: torch.Tensor, fqn: str, saved: SavedState, is_listed: bool
    ) -> dict[Any, Any] | None:
        own = underlying(self._optimizer).state.get(parameter) or {}
        if fqn not in saved.state:
            if not is_listed and self._strict and parameter.requires_grad:
                self._problems.missing.append(fqn)
            elif is_listed and self._strict and own and parameter.requires_grad:
                self._problems.losing.append(fqn)
            # Saved without state, a parameter had not been stepped; unknown, it keeps what it has.
            return dict(own) if own and (not is_listed or not self._strict) else None
        theirs = saved.state[fqn]
        if not isinstance(theirs, Mapping):
            return dict(own) if own else None
        result = {}
        for name, value in theirs.items():
            key = _own_key(name, own) if saved.is_flat else name
            result[key] = self._value_for(parameter, f"{fqn}.{name}", key, value, own.get(key), saved.is_flat)
            if isinstance(value, str | bytes):
                self._strings.append((parameter, key, value))
        return result

    def _value_for(
        self, parameter: torch.Tensor, path: str, key: Any, value: Any, own: Any, is_flat: bool, top: bool = True
    ) -> Any:
        if is_tensor_source(value):
            return self._target_for(parameter, path, key, value, own, top)
        if isinstance(value, Mapping):
            own = own if isinstance(own, dict) else {}
            result = {}
            for name, element in value.items():
                inner = _own_key(name, own) if is_flat else name
                result[inner] = self._value_for(
                    parameter, f"{path}.{name}", key, element, own.get(inner), is_flat, top=False
                )
            return result
        if type(value) in (list, tuple):
            owns = own if isinstance(own, list | tuple) and len(own) == len(value) else [None] * len(value)
            return type(value)(
                self._value_for(parameter, f"{path}.{at}", key, element, owns[at], is_flat, top=False)
                for at, element in enumerate(value)
            )
        if isinstance(own, torch.Tensor) and own.dim() == 0 and isinstance(value, int | float):
            return torch.full_like(own, value)
        return value

    def _target_for(
        self, parameter: torch.Tensor, path: str, key: Any, value: Any, own: Any, top: bool
    ) -> torch.Tensor | int | float:
        if not isinstance(own, torch.Tensor) and isinstance(own, int | float) and not value.shape:
            number: int | float = value.item()
            return number
        if value is own or (isinstance(value, torch.Tensor) and is_fresh(value, self._optimizer)):
            tensor: torch.Tensor = value
            return tensor
        expected = own if isinstance(own, torch.Tensor) else None
        if expected is not None and expected.shape not in (value.shape, parameter.shape):
            expected = None  # State that changes its size as the optimizer goes: replaced.
        elif expected is None and top and _has_own_layout(value, parameter):
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

    def _memory_for(
        self, parameter: torch.Tensor, value: torch.Tensor | Announced, expected: torch.Tensor | None
    ) -> torch.Tensor:
        if expected is not None:
            # Its own memory: no more is needed, and captured graphs keep their addresses.
            return expected
        if value.shape == parameter.shape and len(value.shape):
            fits = value.dtype.is_floating_point == parameter.dtype.is_floating_point
            # What load_state_dict would convert it to.
            return torch.empty_like(parameter.detach(), dtype=parameter.dtype if fits else value.dtype)
        if isinstance(value, torch.Tensor):
            return torch.empty_like(value.detach())
        return torch.empty(value.shape, dtype=value.dtype, device=parameter.device)

    def _initial_value(self, parameter: torch.Tensor, key: Any) -> torch.Tensor | None:
        """Return what the optimizer would begin with; asked for only where the parameter does not tell the layout."""
        if self._initial is None:
            try:
                self._initial = initial_state(self._optimizer)
            except PlanError:
                self._initial = {}
        found = self._initial.get(id(parameter), {}).get(key)
        return found if isinstance(found, torch.Tensor) else None


def _has_own_layout(value: torch.Tensor | Announced, parameter: torch.Tensor) -> bool:
    """Tell whether state is laid out otherwise than its parameter, or may be: scalars of scalar DTensors."""
    if len(value.shape) == 0:
        return isinstance(parameter, DTensor) and parameter.dim() == 0
    return value.shape != parameter.shape


def _own_key(name: Any, own: Mapping[Any, Any]) -> Any:
    """Return the optimizer's own key for a name that flattening turned into a string."""
    if name in own:
        return name
    return next((key for key in own if str(key) == name), name)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(element) for key, element in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(element) for element in value)
    return value


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first is second or (first.shape == second.shape and bool(torch.equal(first, second)))
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        return False
    return bool(first == second)
