"""Checks of sizes before anything is copied, and memory for values that have no size yet.

``nn.Module.load_state_dict`` copies what fits and then raises for what does not: the model is left half loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from dcp_plugins.errors import PlanError
from dcp_plugins.state_dict.full import Announced, Copy
from dcp_plugins.state_dict.keys import self_loading
from dcp_plugins.state_dict.names import Names

__all__ = ["check_fit", "keeps_sizes", "landed"]

_SHOWN = 12


def check_fit(tree: Mapping[str, Any], names: Names, title: str) -> None:
    """Raise if a tensor has another size than the model's, or is a DTensor on another mesh.

    Modules that load their part themselves (an own ``_load_from_state_dict``, a pre-hook) may take other sizes and are
    left to do so.

    Args:
        tree: Values by canonical name.
        names: The model's names.
        title: What to call the model.

    Raises:
        PlanError: (a RuntimeError) Names every tensor that does not fit; nothing has been changed.
    """
    problems = {}
    for fqn, value in tree.items():
        target = names.tensors.get(fqn)
        if target is None or not isinstance(value, torch.Tensor) or is_lazy(target):
            continue
        # load_state_dict() takes the first element of a vector for a scalar.
        if value.shape != target.shape and not (target.dim() == 0 and value.dim() == 1):
            problems[fqn] = f"size mismatch for {fqn}: found {tuple(value.shape)}, the model has {tuple(target.shape)}"
        elif isinstance(value, DTensor) and isinstance(target, DTensor) and value.device_mesh != target.device_mesh:
            meshes = f"found {value.device_mesh}, the model has {target.device_mesh}"
            problems[fqn] = f"mesh mismatch for {fqn}: {meshes} (load it with full_state_dict=True, or by a checkpoint)"
    if problems:
        free = self_loading(names, keeps_sizes)
        problems = {fqn: text for fqn, text in problems.items() if not fqn.startswith(free)}
    if problems:
        lines = [problems[fqn] for fqn in sorted(problems)]
        rest = f"; ... ({len(lines) - _SHOWN} more)" if len(lines) > _SHOWN else ""
        raise PlanError(
            f"Error(s) in loading state_dict for {title}: {'; '.join(lines[:_SHOWN])}{rest}. Nothing has been loaded."
        )


def landed(path: str, value: Any, copies: list[Copy]) -> Any:
    """Return a value with memory in the place of every tensor that rank 0 announced in it.

    Args:
        path: What to call the value in errors.
        value: Nested dicts, lists and tuples of anything.
        copies: Gets what fills that memory.
    """
    if isinstance(value, Announced):
        memory = torch.empty(value.shape, dtype=value.dtype)
        copies.append(Copy(path, memory, value))
        return memory
    if isinstance(value, dict):
        return {key: landed(f"{path}.{key}", element, copies) for key, element in value.items()}
    if type(value) in (list, tuple):
        return type(value)(landed(f"{path}.{at}", element, copies) for at, element in enumerate(value))
    return value


def keeps_sizes(call: Any) -> bool:
    """Tell whether a hook or method of loading is one of torch's that leave sizes as they are."""
    module = getattr(call, "__module__", None) or ""
    return module.startswith(("torch.nn.", "torch.distributed.", "torch._dynamo."))
