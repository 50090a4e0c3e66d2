"""Loading a checkpoint of ours into a Trainer: the model, then optimizer and scheduler, then the random states.

The Trainer asks for each at the point of its set-up where the object can take its state. The loads are driven by the
checkpoint's keys: an optimizer that has not stepped yet gets all of its saved state.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

import dcp_plugins as dcp
from dcp_plugins.errors import PlanError, listing
from dcp_plugins.format.trust import SafeGlobal
from dcp_plugins.manager import OptimizerState, RandomState, load_state, unwrapped_plan_errors
from dcp_plugins.manager.agreement import deciding_ranks
from dcp_plugins.plan.values import load_value
from dcp_plugins.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from dcp_plugins.state_dict.keys import keeps_keys, self_loading
from dcp_plugins.state_dict.names import names_of
from dcp_plugins.state_dict.owned import own_model_state
from dcp_plugins.transformers.adapters import has_adapters, only_adapters
from dcp_plugins.transformers.layout import MODEL, OPTIMIZER, RANDOM, TRAINER
from dcp_plugins.transformers.save import SCALER, SCHEDULER
from dcp_plugins.transformers.unwrapped import bare_optimizer, model_of, scheduler_of
from dcp_plugins.user_warnings import warn_user

__all__ = ["load_model", "load_optimizer_and_scheduler", "load_random_state", "names_in"]


_ADVICE = (
    "Resume with the model and the optimizer that were saved. To go on with the weights alone, load them into the model"
    " and train without resume_from_checkpoint."
)


def load_model(
    model: nn.Module, path: Path, *, weights_only: bool = True, safe_globals: Iterable[SafeGlobal] = ()
) -> None:
    """Load the weights of a checkpoint into a model, in place; every rank calls it.

    As the Trainer does, this loads the keys that the model and the checkpoint share, and warns of the others. A module
    that loads its part itself gets all of its saved keys. Keys of adapters must be in the checkpoint.

    Raises:
        PlanError: An adapter's keys are missing, or all keys are.
    """
    saved = names_in(path).get(MODEL, set())
    wanted = only_adapters(model, get_model_state_dict(model))
    missing, unexpected = wanted.keys() - saved, saved - wanted.keys()
    free = self_loading(names_of(model), keeps_keys) if unexpected else ()
    given = {name for name in unexpected if name.startswith(free)}
    if missing and (has_adapters(model) or (missing == wanted.keys() and not given)):
        raise PlanError(
            f"Expected {'the adapters of the model' if has_adapters(model) else 'the model'} in the checkpoint {path},"
            f" but these keys are missing: {listing(missing)}. It holds {listing(saved) or 'no model'}."
        )
    options = StateDictOptions(strict=False)
    state = {MODEL: own_model_state(model, options=options, values=wanted, hint=f"This is {path}.")}
    with unwrapped_plan_errors(_ADVICE):
        load_state(state, path, weights_only=weights_only, safe_globals=safe_globals)
    # The load has filled the tensors. This call sets the other values, and runs the modules' load hooks.
    found = set_model_state_dict(model, state[MODEL], options=options)
    missing &= {*found.missing_keys}
    unexpected = (unexpected - given) | {*found.unexpected_keys}
    for what, names in (("missing from", missing), ("unexpected in", unexpected)):
        if names and deciding_ranks().is_coordinator:
            warn_user(f"Keys {what} the checkpoint {path}, left as they are: {listing(names)}")


def load_optimizer_and_scheduler(
    trainer: Trainer, path: Path, *, weights_only: bool, safe_globals: Iterable[SafeGlobal] = ()
) -> None:
    """Load optimizer, scheduler and scaler; a checkpoint of weights alone has none, which a warning says."""
    parts = names_in(path)
    if OPTIMIZER not in parts:
        if trainer.is_world_process_zero():
            warn_user(f"{path} was saved with save_only_model: optimizer and learning-rate schedule begin anew.")
        return
    scaler: Any = getattr(trainer.accelerator, "scaler", None)
    rest = [SCHEDULER] if scaler is None or SCALER not in parts[TRAINER] else [SCHEDULER, SCALER]
    state: dict[str, Any] = {
        OPTIMIZER: OptimizerState(model_of(trainer), [bare_optimizer(trainer)]),
        TRAINER: dict.fromkeys(rest, b""),
    }
    with unwrapped_plan_errors(_ADVICE):
        load_state(state, path, weights_only=weights_only, safe_globals=safe_globals)
    for name, stateful in ((SCHEDULER, scheduler_of(trainer)), (SCALER, scaler)):
        if name in rest:
            value = load_value(
                f"{path}: {TRAINER}.{name}",
                io.BytesIO(state[TRAINER][name]),
                weights_only=weights_only,
                safe_globals=safe_globals,
                how_to_trust="DCPCallback(weights_only=False)",
            )
            stateful.load_state_dict(value)


def load_random_state(path: Path) -> None:
    """Restore the random states of each rank; on another number of ranks, by the rule of `RandomState`."""
    if RANDOM in names_in(path):
        load_state({RANDOM: RandomState()}, path)


def names_in(path: Path) -> dict[str, set[str]]:
    """Return the names in each part of a checkpoint, from its metadata."""
    metadata = deciding_ranks().settle("read metadata", lambda: dcp.FileSystemReader(path).read_metadata())
    paths = metadata.planner_data or {}
    parts: dict[str, set[str]] = {}
    for fqn in metadata.state_dict_metadata:
        where = paths.get(fqn) or fqn.split(".", 1)
        parts.setdefault(str(where[0]), set()).add(str(where[1]) if len(where) > 1 else "")
    return parts
