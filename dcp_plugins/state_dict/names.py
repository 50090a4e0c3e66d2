"""Canonical names: what parameters, buffers and modules are called in the model that nobody has wrapped.

One walk over the module tree gives every map that the getters and setters need. Three kinds of path occur:

- the *attribute path*, as ``named_modules`` gives it (``module._orig_mod.layers.0._checkpoint_wrapped_module``);
- the *stored path*, as the keys of ``state_dict()`` have it: activation-checkpoint wrappers remove their own part;
- the *canonical path*, free of every wrapper (``layers.0``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dcp_plugins.events import record
from dcp_plugins.state_dict.fsdp1 import FlatPiece, is_flat, pieces_of

__all__ = ["Model", "Names", "memory_key", "names_of", "state_dict_call"]

# A model, or the parts of one that a rank holds (pipeline stages), each named as in the whole.
Model = nn.Module | Sequence[nn.Module]

_CHECKPOINT_CHILD = "_checkpoint_wrapped_module"

# Where a class of wrapper is defined, and under which name it holds the wrapped module. The classes are looked up only
# among the modules already imported: no instance can exist of a class that is not, and importing them all is slow.
_WRAPPERS = (
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
)


@dataclass(frozen=True, slots=True)
class Names:
    """The canonical names of one model, as it was when it was walked. All paths are without a trailing dot."""

    canonical_paths: dict[str, str]  # Attribute or stored path of a module -> its canonical path.
    stored_paths: dict[str, str]  # Canonical path -> stored path of the innermost module there.
    stored_names: dict[str, str]  # Canonical name of a tensor -> its key in ``state_dict()``, if no hook renames it.
    module_paths: dict[int, list[str]]  # id(module) -> its canonical paths, several if it is shared.
    tensors: dict[str, torch.Tensor]  # Canonical name, aliases included -> parameter or buffer.
    parameter_names: dict[int, list[str]]  # id(parameter) -> its names, first the one of ``named_parameters()``.
    is_wrapped: bool  # Some path differs from its canonical one.
    parts: dict[str, nn.Module]  # What was walked, by the path before its keys: one model under "", or several.
    hidden_names: dict[str, list[str]] = field(default_factory=dict)  # Canonical name -> names by fqn modifiers.
    units: list[nn.Module] = field(default_factory=list)  # Modules wrapped by FSDP1.
    pieces: dict[str, FlatPiece] = field(default_factory=dict)  # Canonical name -> what FSDP1 leaves here of it.
    flats: dict[int, list[str]] = field(default_factory=dict)  # id(flat parameter) -> its parameters' names.
    flat_keys: dict[str, int] = field(default_factory=dict)  # Stored name of a flat parameter -> its id.
    buffer_dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # Buffers that FSDP1 may have cast.

    def canonical(self, key: str) -> str:
        """Return the canonical form of a ``state_dict()`` key; keys made up by hooks keep what is unknown in them."""
        return _translate(key, self.canonical_paths) if self.is_wrapped else key

    def stored(self, fqn: str) -> str:
        """Return the key that ``load_state_dict()`` expects for a canonical name."""
        if not self.is_wrapped:
            return fqn
        return self.stored_names.get(fqn) or _translate(fqn, self.stored_paths)

    def fqns(self, parameter: torch.Tensor) -> list[str]:
        """Return the canonical name of a parameter, those in an FSDP1 flat parameter; none if it is not the model's."""
        return self.flats.get(id(parameter)) or self.parameter_names.get(id(parameter), [])[:1]

    def spellings(self, parameter: torch.Tensor) -> list[str]:
        """Return every name under which a state dict may know the parameter, the canonical one first."""
        found = self.parameter_names.get(id(parameter), [])
        if not self.hidden_names:
            return found
        return [*found, *(hidden for name in found for hidden in self.hidden_names.get(name, ()))]

    def aliases(self, fqn: str) -> list[str]:
        """Return every canonical name of the parameter that has this one."""
        return self.parameter_names[id(self.tensors[fqn])]

    def held_together(self) -> Iterator[Any]:
        """Yield what tells which ranks hold the model with this one, as ``collected`` takes it."""
        for value in self.tensors.values():
            if isinstance(value, DTensor):
                yield value
        for piece in self.pieces.values():
            if not piece.is_whole:
                yield piece.group, piece.flat.device.type

    def is_frozen(self, fqn: str) -> bool:
        """Tell whether the name is a parameter's that takes no gradient."""
        piece = self.pieces.get(fqn)
        value = piece.parameter if piece is not None else self.tensors.get(fqn)
        return isinstance(value, nn.Parameter) and not value.requires_grad

    def tied(self, fqns: Iterable[str]) -> dict[str, list[str]]:
        """Return, for each name, all names of the same tensor: one object, or several over the same memory.

        A view in another shape, or transposed, is the same memory; a part of it is not.
        """
        by_tensor: dict[object, list[str]] = {}
        keys = {name: _span(value) or memory_key(value) or id(value) for name, value in self.tensors.items()}
        for name, key in keys.items():
            by_tensor.setdefault(key, []).append(name)
        return {fqn: by_tensor[keys[fqn]] if fqn in keys else [fqn] for fqn in fqns}


def memory_key(value: torch.Tensor) -> tuple[Any, ...] | None:
    """Return what two tensors over exactly the same elements have in common; None for a tensor without memory."""
    # DTensor.to_local() records an autograd node; only the address matters here.
    local = getattr(value, "_local_tensor", value)
    try:
        if local.is_meta or local.numel() == 0 or local.layout != torch.strided:
            return None
        return (local.data_ptr(), tuple(local.shape), local.stride(), local.dtype, tuple(value.shape))
    except (RuntimeError, ValueError):  # Tensor subclasses without storage, lazy parameters without a shape.
        return None


def _span(value: torch.Tensor) -> tuple[int, int, torch.dtype] | None:
    """Return the memory that a tensor fills without gaps, in whichever order; None if it has gaps or no memory."""
    if hasattr(value, "_local_tensor") or memory_key(value) is None:
        return None
    filled = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1 and stride != filled:
            return None
        filled *= size
    return (value.data_ptr(), filled, value.dtype)


def names_of(model: Model, fqn_modifiers: str = "_fqn_modifiers") -> Names:
    """Walk the model once and return its canonical names.

    Modules of FSDP1 and FSDP2 that still hold gathered parameters (the root does after a forward without backward) are
    resharded first: the sharded parameters are the ones that an optimizer knows. This frees memory and communicates
    nothing.

    Args:
        model: A model, or its parts on this rank, as pipeline stages are.
        fqn_modifiers: See ``StateDictOptions.dsd_fqn_modifiers``.

    Raises:
        UnsupportedValueError: The model uses FSDP1 over tensor parallelism.
    """
    parts = [model] if isinstance(model, nn.Module) else list(model) if isinstance(model, Sequence) else [model]
    for part in parts:
        if not isinstance(part, nn.Module):
            raise TypeError(f"Expected an nn.Module, or a list of the parts of one, found {type(part).__name__}.")
    walk = _Walk(fqn_modifiers)
    paths = [""] if len(parts) == 1 else [str(at) for at in range(len(parts))]
    with record("state_dict.names"):
        for path, part in zip(paths, parts, strict=True):
            walk.visit(part, path, path, "", None)
    names = Names(
        canonical_paths=walk.canonical_paths,
        stored_paths=walk.stored_paths,
        stored_names=walk.stored_names,
        module_paths=walk.module_paths,
        tensors=walk.tensors,
        parameter_names=walk.parameter_names,
        is_wrapped=any(path != canonical for path, canonical in walk.canonical_paths.items()),
        parts=dict(zip(paths, parts, strict=True)),
        hidden_names=walk.hidden_names,
        units=walk.units,
        flat_keys=walk.flat_keys,
        buffer_dtypes=walk.buffer_dtypes,
    )
    for piece in walk.pieces:
        _name_piece(piece, names)
    return names


def _name_piece(piece: FlatPiece, names: Names) -> None:
    local = piece.local()
    places = ((piece.owner, piece.name), *piece.aliases)
    for at, fqn in enumerate(_join(path, name) for module, name in places for path in names.module_paths[id(module)]):
        names.pieces[fqn] = piece
        if not piece.is_original:
            names.tensors[fqn] = local
            if at == 0:
                names.flats.setdefault(id(piece.flat), []).append(fqn)
            names.parameter_names.setdefault(id(local), []).append(fqn)


def state_dict_call(owner: nn.Module | torch.optim.Optimizer, method: str) -> Callable[..., Any]:
    """Return the owner's ``state_dict`` or ``load_state_dict``, past the ones that ``patch.py`` put on the instance."""
    call: Callable[..., Any] = getattr(owner, method)
    # Mocks have any attribute, which is true.
    if getattr(call, "_dcp_plugins_patch", False) is True:
        bound: Callable[..., Any] = getattr(type(owner), method).__get__(owner)
        return bound
    return call


@dataclass(frozen=True, slots=True)
class _Traits:
    """The facts about a class of modules that the walk needs. It finds them once for each class: lookups are slow."""

    wrapped_child: str | None
    """The name under which a wrapper keeps the module that it wraps; None for a class that is no wrapper."""
    is_fsdp1: bool
    is_fsdp2: bool
    has_modifiers: bool
    """Whether the class has the method that tells which children names leave out."""


class _Walk:
    def __init__(self, fqn_modifiers: str) -> None:
        self.canonical_paths: dict[str, str] = {}
        self.stored_paths: dict[str, str] = {}
        self.module_paths: dict[int, list[str]] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.parameter_names: dict[int, list[str]] = {}
        self.hidden_names: dict[str, list[str]] = {}
        self.stored_names: dict[str, str] = {}
        self.units: list[nn.Module] = []
        self.pieces: list[FlatPiece] = []
        self.flat_keys: dict[str, int] = {}
        self.buffer_dtypes: dict[str, torch.dtype] = {}
        self._fqn_modifiers = fqn_modifiers
        self._traits: dict[type, _Traits] = {}

    def _traits_of(self, kind: type) -> _Traits:
        wrappers = ((_imported(module, name), child) for module, name, child in _WRAPPERS)
        fsdp1, fsdp2 = (
            _imported("torch.distributed.fsdp", name) for name in ("FullyShardedDataParallel", "FSDPModule")
        )
        traits = self._traits[kind] = _Traits(
            wrapped_child=next(
                (child for found, child in wrappers if found is not None and issubclass(kind, found)), None
            ),
            is_fsdp1=fsdp1 is not None and issubclass(kind, fsdp1),
            is_fsdp2=fsdp2 is not None and issubclass(kind, fsdp2),
            has_modifiers=hasattr(kind, self._fqn_modifiers),
        )
        return traits

    def visit(self, module: nn.Module, path: str, stored: str, canonical: str, hidden: str | None) -> None:
        """Record a module and what is below it.

        ``hidden`` is the canonical path less the children that modifiers hide; None while nothing is hidden.
        """
        traits = self._traits.get(type(module)) or self._traits_of(type(module))
        if traits.is_fsdp1 and module not in self.units:
            self._visit_unit(module, path, canonical)
        if traits.is_fsdp2:
            cast("Any", module).reshard()
        self.canonical_paths[path] = canonical
        self.canonical_paths.setdefault(stored, canonical)
        # The wrapped module comes after its wrapper and is the one that holds parameters: it wins.
        self.stored_paths[canonical] = stored
        paths = self.module_paths.setdefault(id(module), [])
        if canonical not in paths:
            paths.append(canonical)
        self._record_tensors(module, stored, canonical, hidden)
        # nn.Module looks long for an attribute that is missing, and this one nearly always is.
        known = traits.has_modifiers or self._fqn_modifiers in module.__dict__
        modifiers = getattr(module, self._fqn_modifiers) if known else None
        hidden_children: Iterable[str] = modifiers().values() if callable(modifiers) else ()
        for name, child in module._modules.items():
            if child is None:
                continue
            child_path = _join(path, name)
            if name == _CHECKPOINT_CHILD:
                self.visit(child, child_path, stored, canonical, hidden)
            elif name == traits.wrapped_child:
                self.visit(child, child_path, _join(stored, name), canonical, hidden)
            else:
                below = canonical if hidden is None else hidden
                below = below if name in hidden_children else _join(below, name)
                child_canonical = _join(canonical, name)
                self.visit(
                    child,
                    child_path,
                    _join(stored, name),
                    child_canonical,
                    None if below == child_canonical else below,
                )

    def _visit_unit(self, unit: Any, path: str, canonical: str) -> None:
        self.units.append(unit)
        self.pieces.extend(pieces_of(unit, path))
        if unit._mixed_precision_enabled_for_buffers():
            for name, dtype in unit._buffer_name_to_orig_dtype.items():
                self.buffer_dtypes[_join(canonical, name)] = dtype

    def _record_tensors(self, module: nn.Module, stored: str, canonical: str, hidden: str | None) -> None:
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if is_flat(parameter):
                self.flat_keys[_join(stored, name)] = id(parameter)
                continue
            fqn = _join(canonical, name)
            self.tensors[fqn] = parameter
            self.stored_names[fqn] = _join(stored, name)
            known = self.parameter_names.setdefault(id(parameter), [])
            if fqn not in known:
                known.append(fqn)
            if hidden is not None:
                self.hidden_names.setdefault(fqn, []).append(_join(hidden, name))
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                fqn = _join(canonical, name)
                self.tensors[fqn] = buffer
                self.stored_names[fqn] = _join(stored, name)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _imported(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


def _translate(key: str, paths: dict[str, str]) -> str:
    """Replace the longest known module path at the start of the key."""
    path, _, rest = key.rpartition(".")
    while (found := paths.get(path)) is None:
        path, _, last = path.rpartition(".")
        rest = f"{last}.{rest}"
    return _join(found, rest)
