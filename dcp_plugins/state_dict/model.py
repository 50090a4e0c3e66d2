"""Getting a model's parameters and buffers under canonical names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dcp_plugins.errors import PlanError
from dcp_plugins.events import record
from dcp_plugins.state_dict.fsdp1 import own_hooks_only
from dcp_plugins.state_dict.full import (
    collected,
)
from dcp_plugins.state_dict.module_save import module_state
from dcp_plugins.state_dict.names import Names
from dcp_plugins.state_dict.options import StateDictOptions
from dcp_plugins.state_dict.types import ValueType
from dcp_plugins.user_warnings import warn_user

__all__ = ["get_model", "own_state", "warn_about_submodules"]


def warn_about_submodules(submodules: set[nn.Module] | None) -> None:
    """Warn the caller's caller if ``submodules`` is given."""
    if submodules:
        warn_user(
            "`submodules` is deprecated: get the state dict of the whole model and keep the keys you want, or call "
            "the getter on the submodule.",
            FutureWarning,
        )


@torch.no_grad()
def get_model(
    names: Names, options: StateDictOptions, submodules: Iterable[nn.Module] | None = None
) -> dict[str, ValueType]:
    """Return the model's state dict under canonical names; its tensors share the model's memory.

    The values are those of ``model.state_dict()``, so that every hook and override of the model's own has its say.
    FSDP1's hooks, which gather, are not among them: its parameters are views of what this rank holds.
    """
    versions: OrderedDict[str, Any] | None = None

    def own() -> OrderedDict[str, Any]:
        nonlocal versions
        result, versions = own_state(names)
        if submodules:
            result = _of_submodules(result, names, submodules, keep_prefixes=options.keep_submodule_prefixes)
        if options.ignore_frozen_params:
            for fqn in [fqn for fqn in result if names.is_frozen(fqn)]:
                del result[fqn]
        return result

    def identity(fqn: str) -> int | None:
        value = names.tensors.get(fqn)
        return None if value is None else id(value)

    plain = collected(own, options, identity, names.held_together())
    if versions is None or not plain:
        return plain
    result: OrderedDict[str, Any] = plain if isinstance(plain, OrderedDict) else OrderedDict(plain)
    result._metadata = versions  # type: ignore[attr-defined]
    return result


def own_state(names: Names) -> tuple[OrderedDict[str, Any], OrderedDict[str, Any] | None]:
    """Return the model's ``state_dict()`` under canonical names, and its modules' versions by canonical path.

    Versions travel in an attribute of the dict, for which ``load_state_dict`` looks.
    """
    result: OrderedDict[str, Any] = OrderedDict()
    versions: OrderedDict[str, Any] | None = None
    shaped: dict[int, torch.Tensor] = {}  # Tied parameters have one piece, and are one tensor here too.

    def put(fqn: str, value: Any) -> None:
        if fqn in result:
            where = "Two keys of the model's state_dict()"
            if len(names.parts) > 1:
                where = "Keys in the state_dict() of two of the model's parts"
            raise PlanError(f"{where} have the same canonical name '{fqn}'.")
        piece = names.pieces.get(fqn)
        if piece is not None:
            if id(piece) not in shaped:
                shaped[id(piece)] = piece.shaped(piece.local())
            value = shaped[id(piece)]
        elif fqn in names.buffer_dtypes and isinstance(value, torch.Tensor):
            value = value.to(names.buffer_dtypes[fqn])
        result[fqn] = value

    with own_hooks_only(names.units):
        for path, part in names.parts.items():
            with record("state_dict.call"):
                stored = module_state(part)
            prefix = f"{path}." if path else ""
            for key, value in stored.items():
                flat = names.flat_keys.get(f"{prefix}{key}")
                if flat is None:
                    put(names.canonical(f"{prefix}{key}"), value)
                    continue
                for fqn in (name for first in names.flats[flat] for name in names.aliases(first)):
                    put(fqn, None)
            found = getattr(stored, "_metadata", None)
            if found is not None:
                versions = OrderedDict() if versions is None else versions
                for at, version in found.items():
                    full_path = f"{prefix}{at}" if at else path
                    versions[names.canonical_paths.get(full_path, full_path)] = version
    return result, versions


def _of_submodules(
    state_dict: Mapping[str, Any], names: Names, submodules: Iterable[nn.Module], *, keep_prefixes: bool
) -> OrderedDict[str, Any]:
    prefixes = [f"{path}." if path else "" for module in submodules for path in names.module_paths.get(id(module), ())]
    return OrderedDict(
        (fqn if keep_prefixes else fqn[len(prefix) :], value)
        for fqn, value in state_dict.items()
        for prefix in prefixes
        if fqn.startswith(prefix)
    )
