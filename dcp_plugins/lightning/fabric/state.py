"""What a dict that is given to ``fabric.save`` or ``fabric.load`` holds: modules, optimizers, and the rest.

Modules and optimizers are parts of the DCP data, under the names that the user has given them; their tensors are named
as in ``module.state_dict()``, and an optimizer's state by the parameters it belongs to. Everything else goes into the
non-tensor part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dcp_plugins.lightning.layout import META_KEY
from dcp_plugins.lightning.optimizer_state import optimizer_state_of
from dcp_plugins.manager.diverging import Replicas
from dcp_plugins.plan.flatten import KeyPath
from dcp_plugins.state_dict import get_model_state_dict

__all__ = ["Entries", "Filters", "divide", "is_stateful", "naming_module"]

Filters = Mapping[str, Callable[[str, Any], bool]]


@dataclass(frozen=True, slots=True)
class Entries:
    """The entries of a state, by kind."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, tuple[nn.Module, Optimizer]]
    """Each with the module that names its parameters."""
    rest: dict[str, Any]
    """Also optimizers over tensors that are no parameters of a known module."""

    def state_dicts(self, filters: Filters) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the parts that hold tensors, each rank with its own shards, and the rest.

        Args:
            filters: By entry, which keys of its state dict are saved; an entry of which nothing is left is not saved.
        """
        parts: dict[str, Any] = {name: get_model_state_dict(module) for name, module in self.modules.items()}
        for name, (module, optimizer) in self.optimizers.items():
            parts[name] = optimizer_state_of(module, optimizer)
        rest = {name: value.state_dict() if is_stateful(value) else value for name, value in self.rest.items()}
        return _filtered(parts, filters), _filtered(rest, filters)

    def diverging_in(self, parts: Mapping[str, Any], modules: Iterable[nn.Module]) -> Iterator[KeyPath]:
        """Yield the paths of values that ranks may hold with different contents, of which stock saves rank 0's.

        Args:
            parts: The result of `state_dicts`.
            modules: All modules that are trained, in DDP's wrappers.
        """
        models = (((name,), parts.get(name, {})) for name in self.modules)
        optimizers = (((name,), optimizer) for name, (_, optimizer) in self.optimizers.items())
        yield from Replicas(modules).diverging(models, optimizers)


def divide(state: Mapping[str, Any], known: Iterable[nn.Module]) -> Entries:
    """Tell modules, optimizers and the rest apart.

    Args:
        state: As Fabric hands it on, without its wrappers.
        known: Modules that have been set up, in the same order on every rank: they name the parameters of optimizers
            whose module is not in the state.

    Raises:
        ValueError: An entry has the name under which the non-tensor part is saved.
    """
    if META_KEY in state:
        raise ValueError(
            f"The entry {META_KEY!r} of the state has a name that checkpoints use. Call it something else."
        )
    modules = {name: value for name, value in state.items() if isinstance(value, nn.Module)}
    optimizers = {}
    for name, value in state.items():
        if isinstance(value, Optimizer):
            module = naming_module(value, modules, known)
            if module is not None:
                optimizers[name] = (module, value)
    rest = {name: value for name, value in state.items() if name not in modules and name not in optimizers}
    return Entries(modules, optimizers, rest)


def naming_module(
    optimizer: Optimizer, modules: Mapping[str, nn.Module], known: Iterable[nn.Module]
) -> nn.Module | None:
    """Find the module that all parameters of an optimizer are in; if several share them, make one that holds these."""
    wanted = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for module in (*modules.values(), *known):
        if wanted <= _parameters(module):
            return module
    sharing = {name: module for name, module in modules.items() if wanted & _parameters(module)}
    if wanted - {parameter for module in sharing.values() for parameter in _parameters(module)}:
        return None
    together = nn.Module()
    for name, module in sharing.items():
        together.add_module(name.replace(".", "_"), module)
    return together


def is_stateful(value: Any) -> bool:
    """Tell whether a value gives and takes its state by itself."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _parameters(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


def _filtered(state: dict[str, Any], filters: Filters) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in state.items():
        if name not in filters or not isinstance(value, dict):
            kept[name] = value
            continue
        wanted = {key: entry for key, entry in value.items() if filters[name](key, entry)}
        if wanted:
            kept[name] = wanted
    return kept
