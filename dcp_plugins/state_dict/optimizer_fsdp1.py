"""Setting optimizer state for what FSDP1 leaves on a rank: pieces of parameters, alone or in a flat parameter."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dcp_plugins.errors import listing
from dcp_plugins.state_dict.fsdp1 import FlatPiece, flat_memory
from dcp_plugins.state_dict.full import Announced, Copy, is_tensor_source
from dcp_plugins.state_dict.initial import is_fresh
from dcp_plugins.tensors import chunks
from dcp_plugins.tensors.sharded import dtype_of, size_of
from dcp_plugins.torch_private import ShardedTensor

__all__ = ["FlatState", "is_memory_of", "merge", "piece_copy"]


@dataclass(slots=True)
class FlatState:
    """State of one flat parameter, put together from the states of the parameters in it. Making it changes nothing."""

    tensors: dict[Any, torch.Tensor] = field(default_factory=dict)  # Laid out as the flat parameter's shard.
    shared: dict[Any, Any] = field(default_factory=dict)  # One value for all parameters: step counts.
    copies: list[Copy] = field(default_factory=list)  # What fills ``tensors``.
    problems: list[str] = field(default_factory=list)


def piece_copy(
    piece: FlatPiece, path: str, local: torch.Tensor, source: torch.Tensor | Announced, *, full: bool
) -> Copy | str:
    """Return the copy that fills this rank's elements of a parameter-shaped value, or what is wrong with the source.

    Args:
        piece: The parameter.
        path: What the value is called.
        local: The piece's elements, 1-D.
        source: A value of the parameter's shape.
        full: Whole tensors are expected.
    """
    if not full and not piece.is_whole and not isinstance(source, DTensor | ShardedTensor):
        return (
            f"Expected a sharded tensor for the state {path} of a parameter in FSDP1, found a plain tensor. If it is "
            "whole, pass StateDictOptions(full_state_dict=True)."
        )
    target = piece.shaped(local)
    if isinstance(source, ShardedTensor) and flat_memory(source) is not None and chunks(source) != chunks(target):
        # Filling from it would gather, and ranks without a part of it have no entry to gather with.
        return (
            f"Found the state {path} sharded otherwise than this FSDP1 model shards it. Get the state dict with "
            "StateDictOptions(full_state_dict=True), or load the checkpoint into this optimizer's own state dict."
        )
    return Copy(path, target, source)


def merge(
    pieces: Sequence[tuple[str, FlatPiece]],
    states: Mapping[str, Mapping[Any, Any]],
    own: Mapping[Any, Any],
    optimizer: Optimizer,
    known: Collection[str],
    *,
    full: bool,
) -> FlatState:
    """Put the states of the parameters in one flat parameter together.

    Args:
        pieces: The flat parameter's parameters, in its order, each with its name in ``states``.
        states: State by name; a parameter that had none when it was saved is not in it.
        own: What the optimizer has for the flat parameter.
        optimizer: Whose it is.
        known: Names that were saved, with state or without; the others keep what they have.
        full: Whole tensors are expected.
    """
    result = FlatState()
    flat = pieces[0][1].flat.detach()
    for name in {name: None for state in states.values() for name in state}:
        found = {fqn: states[fqn][name] for fqn, _ in pieces if fqn in states and name in states[fqn]}
        nested = [fqn for fqn, value in found.items() if isinstance(value, Mapping | list | tuple)]
        if nested:
            result.problems.append(
                f"Cannot merge the state '{name}' of {listing(nested)} into an FSDP1 flat parameter: expected a tensor "
                "or a number, found a container. Wrap the model with use_orig_params=True."
            )
        elif any(is_tensor_source(found[fqn]) and size_of(found[fqn]) == p.shape for fqn, p in pieces if fqn in found):
            _merge_tensors(result, name, pieces, found, own.get(name), flat, optimizer, known, full=full)
        else:
            if name in own and len(known) < len(pieces):
                found["what the optimizer has for those that were not saved"] = own[name]
            first = next(iter(found.values()))
            different = [fqn for fqn, value in found.items() if not _same(value, first)]
            if different:
                result.problems.append(
                    f"Parameters in one FSDP1 flat parameter have different values of the state '{name}': "
                    f"{_shown(first)} for '{next(iter(found))}', {_shown(found[different[0]])} for "
                    f"{listing(different)}. A flat parameter has one: wrap the model with use_orig_params=True."
                )
            result.shared[name] = first
    return result


def _merge_tensors(
    result: FlatState,
    name: Any,
    pieces: Sequence[tuple[str, FlatPiece]],
    found: Mapping[str, Any],
    own: Any,
    flat: torch.Tensor,
    optimizer: Optimizer,
    known: Collection[str],
    *,
    full: bool,
) -> None:
    memories = {id(memory): memory for value in found.values() if (memory := flat_memory(value)) is not None}
    if len(memories) == 1 and all(flat_memory(value) is not None for value in found.values()):
        (memory,) = memories.values()
        if memory.shape == flat.shape and (is_fresh(memory, optimizer) or is_memory_of(memory, own)):
            result.tensors[name] = memory
            return
    has_own = pieces[0][1].holds(own)
    dtype = next(dtype_of(value) for value in found.values())
    if dtype.is_floating_point == flat.dtype.is_floating_point:
        dtype = flat.dtype  # What load_state_dict would convert it to.
    # Padding, and parameters saved without state, begin with zeros.
    memory = own if has_own else torch.zeros_like(flat, dtype=dtype)
    result.tensors[name] = memory
    for fqn, piece in pieces:
        path = f"{fqn}.{name}"
        local = piece.slice_of(memory)
        if fqn not in found:
            if has_own and local.numel() and fqn in known:
                result.copies.append(Copy(path, local, torch.zeros_like(local)))
            continue
        source = found[fqn]
        if not is_tensor_source(source) or size_of(source) != piece.shape:
            shown = tuple(size_of(source)) if is_tensor_source(source) else source
            result.problems.append(f"size mismatch for the state {path}: found {shown}, expected {tuple(piece.shape)}.")
            continue
        copy = piece_copy(piece, path, local, source, full=full)
        if isinstance(copy, str):
            result.problems.append(copy)
        else:
            result.copies.append(copy)


def is_memory_of(memory: torch.Tensor, own: Any) -> bool:
    """Tell whether a ``flat_memory`` is the optimizer's own tensor, or a view of all of it."""
    return isinstance(own, torch.Tensor) and own.data_ptr() == memory.data_ptr()


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.shape == second.shape and bool(torch.equal(first, second))
    return bool(first == second)


def _shown(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
