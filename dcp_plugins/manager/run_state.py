"""Everything that a run needs to go on exactly as if it had not been interrupted, as one state dict."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dcp_plugins.contract import Stateful
from dcp_plugins.errors import listing
from dcp_plugins.manager.rank_bound import PerRank, RandomState
from dcp_plugins.state_dict import StateDictOptions, set_model_state_dict
from dcp_plugins.state_dict.owned import own_model_state, own_optimizer_state, restore_optimizer_state

__all__ = ["ModelState", "OptimizerState", "run_state"]


def run_state(
    *,
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    schedulers: Any | Iterable[Any] = (),
    scaler: Any | None = None,
    dataloader: Any | None = None,
    counters: MutableMapping[str, Any] | None = None,
    rng: bool | RandomState = True,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> dict[str, Any]:
    """Collect what a run needs to go on exactly: a state dict to save, and to load into in place.

    Make it once and save it at every step: it holds the objects, which are asked for their state when a save begins.
    Every rank makes it, of the same parts. `CheckpointManager.restore` and `load_state` load it on any number of ranks,
    with everything that was saved.

    Args:
        model: Plain or parallelised in whatever way; saved under names that do not depend on it.
        optimizers: One or several, over parameters of the model.
        schedulers: One or several learning-rate schedulers.
        scaler: A gradient scaler.
        dataloader: What knows its position in the data (``state_dict`` and ``load_state_dict``, as a
            ``StatefulDataLoader`` or a stateful sampler has), which is saved for each rank; see `PerRank` for what
            happens on another number of ranks.
        counters: A dict of the caller's with steps, epochs, samples seen and the like, the same on all ranks. Loading
            puts the saved values into it.
        rng: Whether to save the random number generators; or a `RandomState` made otherwise than by default.
        process_group: The ranks that save; None takes the default group.
        no_dist: There is this process alone.

    Returns:
        A dict with the keys "model", "optimizer", "schedulers", "scaler", "dataloader", "counters" and "rng", as far
        as there is something under them. Further entries may be added.

    Raises:
        TypeError: A part has no ``state_dict`` and ``load_state_dict``; lists all of them.
    """
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    schedulers = [schedulers] if isinstance(schedulers, Stateful) else list(schedulers)
    parts: dict[str, Any] = {f"schedulers[{index}]": part for index, part in enumerate(schedulers)}
    parts |= {name: part for name, part in (("scaler", scaler), ("dataloader", dataloader)) if part is not None}
    wrong = [f"{name} ({type(part).__name__})" for name, part in parts.items() if not isinstance(part, Stateful)]
    if wrong:
        raise TypeError(
            f"expected objects with state_dict() and load_state_dict(), which these lack: {listing(wrong)}. A"
            " torch.utils.data.DataLoader does not know its position; a StatefulDataLoader does"
        )
    state: dict[str, Any] = {"model": ModelState(model)}
    if optimizers:
        state["optimizer"] = OptimizerState(model, optimizers)
    if schedulers:
        state["schedulers"] = schedulers
    if scaler is not None:
        state["scaler"] = scaler
    if dataloader is not None:
        state["dataloader"] = PerRank(dataloader, process_group=process_group, no_dist=no_dist)
    if counters is not None:
        state["counters"] = counters
    if rng:
        chosen = rng if isinstance(rng, RandomState) else RandomState(process_group=process_group, no_dist=no_dist)
        state["rng"] = chosen
    return state


class ModelState:
    """A model's parameters, buffers and extra state, under names that do not depend on how it is parallelised."""

    def __init__(self, model: nn.Module, *, options: StateDictOptions | None = None) -> None:
        self.model = model
        self.options = options

    def state_dict(self) -> dict[str, Any]:
        return own_model_state(
            self.model,
            options=self.options,
            hint="Pass ModelState(options=StateDictOptions(strict=False)) to load what they share.",
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state_dict, options=self.options)


class OptimizerState:
    """The state of one or several optimizers over a model, by the names of its parameters.

    An optimizer has no state before its first step, and none is saved then.
    """

    def __init__(
        self, model: nn.Module, optimizers: Iterable[Optimizer], *, options: StateDictOptions | None = None
    ) -> None:
        self.model = model
        self.optimizers = list(optimizers)
        self.options = options

    def state_dict(self) -> dict[str, Any]:
        return own_optimizer_state(self.model, self.optimizers, options=self.options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        restore_optimizer_state(self.model, self.optimizers, state_dict, options=self.options)
