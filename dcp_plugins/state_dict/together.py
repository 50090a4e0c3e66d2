"""Failures of one rank that others would wait for: told before the first exchange, and only where there will be one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dcp_plugins.errors import PlanError
from dcp_plugins.events import record
from dcp_plugins.state_dict.broadcast import agree
from dcp_plugins.state_dict.fill import is_resharded
from dcp_plugins.state_dict.flatten import STATE
from dcp_plugins.state_dict.fsdp1 import flat_memory, groups_of
from dcp_plugins.state_dict.gather import gathered
from dcp_plugins.state_dict.names import Model, Names, names_of
from dcp_plugins.state_dict.optimizer import as_optimizers
from dcp_plugins.state_dict.options import StateDictOptions
from dcp_plugins.state_dict.scopes import Scopes, settle
from dcp_plugins.torch_private import ShardedTensor

__all__ = ["begun", "model_pairs", "optimizer_pairs", "relaid", "settled"]

T = TypeVar("T")
Pairs = Iterable[tuple[torch.Tensor, Any]]
"""Targets and what fills them."""

_ANOTHER = "Another rank could not load its state dict."


def begun(
    model: Model,
    options: StateDictOptions,
    optimizers: Optimizer | Iterable[Optimizer] | None = None,
    *,
    needs_optimizer: bool = False,
    setting: bool = False,
) -> tuple[Names, tuple[Optimizer, ...]]:
    """Walk the model and look at the optimizers; a failure reaches every rank that would wait for this one.

    Args:
        model: As the caller gave it.
        options: Where they make the call collective, a failure is sent; where not, nothing is.
        optimizers: As the caller gave them.
        needs_optimizer: No optimizer is an error.
        setting: The call is a setter, for which only ``broadcast_from_rank0`` is collective from the beginning.
    """

    def local() -> tuple[Names, tuple[Optimizer, ...]]:
        found = as_optimizers(optimizers)
        if needs_optimizer and not found:
            raise PlanError("Expected at least one optimizer, found none.")
        return names_of(model, options.dsd_fqn_modifiers), found

    result: tuple[Names, tuple[Optimizer, ...]]
    if setting and options.broadcast_from_rank0:
        result = agree(local)
        return result
    try:
        return local()
    except Exception as exc:
        if options.full_state_dict and not setting:
            # Raises the same, after telling the ranks that wait with what they have to gather.
            gathered((), lambda *_: None, keep=False, among=_held_together(model), failure=exc)
        raise


def settled(check: Callable[[], T], pairs: Callable[[], Pairs]) -> T:
    """Run a check; if copies between the pairs will be collective, its failure reaches every rank that takes part.

    Args:
        check: Local.
        pairs: Called after the check, also if that failed.
    """
    failure: Exception | None = None
    result: Any = None
    try:
        result = check()
    except Exception as exc:  # Raised below.
        failure = exc
    scopes = Scopes()
    for target, source in pairs():
        if is_resharded(target, source):
            scopes.of(source)
    _settle(scopes, failure)
    checked: T = result
    return checked


def model_pairs(tree: Mapping[str, Any], names: Names) -> Iterator[tuple[torch.Tensor, Any]]:
    """Yield what of a state dict fills which of the model's sharded tensors, whether it fits or not."""
    for fqn, value in tree.items():
        if not isinstance(value, DTensor | ShardedTensor):
            continue
        piece = names.pieces.get(fqn)
        if piece is None:
            target = names.tensors.get(fqn)
            if target is not None:
                yield target, value
        elif flat_memory(value) is None:
            # What FSDP1 holds is filled from what FSDP1 held, or refused: neither communicates.
            yield piece.shaped(piece.local()), value


def optimizer_pairs(state_dict: Any, names: Names) -> Iterator[tuple[torch.Tensor, Any]]:
    """Yield what of a nested state dict fills state like which parameter, as far as that shows without a plan."""
    states = state_dict.get(STATE) if isinstance(state_dict, Mapping) else None
    for fqn, state in (states if isinstance(states, Mapping) else {}).items():
        for value in (state if isinstance(state, Mapping) else {}).values():
            if isinstance(value, DTensor | ShardedTensor):
                yield from model_pairs({fqn: value}, names)


def relaid(values: Mapping[str, Any], names: Names) -> Mapping[str, Any]:
    """Return values for ``load_state_dict`` that are laid out as the model's: then it communicates nothing.

    Collective on the meshes of those that were not; the values as they are if there are none.
    """
    result = values
    scopes = Scopes()
    failure: Exception | None = None
    # In one order everywhere, whatever order each rank's state dict has.
    for fqn in sorted(fqn for fqn, value in values.items() if isinstance(value, DTensor)):
        value, target = values[fqn], names.tensors.get(fqn)
        if target is None or not isinstance(target, DTensor) or not is_resharded(target, value):
            continue
        scopes.of(value)
        result = dict(values) if result is values else result
        assert isinstance(result, dict)
        try:
            result[fqn] = value.detach().redistribute(target.device_mesh, target.placements)
        except Exception as exc:  # The others are in the next exchange already.
            failure = failure or exc
    _settle(scopes, failure)
    return result


def _settle(scopes: Scopes, failure: Exception | None) -> None:
    with record("state_dict.agree"):
        settle(scopes.sorted(), failure, _ANOTHER)


def _held_together(model: Model) -> list[Any]:
    """Return what ``Names.held_together`` would yield of a model that cannot be walked, as far as can be told."""
    parts = [model] if isinstance(model, nn.Module) else model if isinstance(model, list | tuple) else []
    found: list[Any] = []
    for part in parts:
        if not isinstance(part, nn.Module):
            continue
        found += [value for value in (*part.parameters(), *part.buffers()) if isinstance(value, DTensor)]
        found += groups_of(part)
    return found
