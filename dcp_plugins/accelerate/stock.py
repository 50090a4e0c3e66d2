"""Loading models and optimizers from what stock Accelerate wrote, whichever way the run that wrote it was distributed.

One process or DDP: ``model.safetensors`` or ``pytorch_model.bin``, and ``optimizer.bin``. FSDP: the directories
``pytorch_model_fsdp_0`` and ``optimizer_0``, or full tensors in ``pytorch_model_fsdp.bin`` and ``optimizer.bin``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils.constants import FSDP_MODEL_NAME, MODEL_NAME, OPTIMIZER_NAME, SAFE_MODEL_NAME
from torch import nn
from torch.optim import Optimizer

from dcp_plugins.accelerate import layout
from dcp_plugins.accelerate.collect import owner_of
from dcp_plugins.errors import CorruptCheckpointError, PlanError, listing
from dcp_plugins.manager import is_committed, load_state
from dcp_plugins.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from dcp_plugins.state_dict.names import names_of
from dcp_plugins.state_dict.numbered import by_name
from dcp_plugins.state_dict.owned import own_model_state, own_optimizer_state, restore_optimizer_state
from dcp_plugins.storage.whole_files import read_safetensors_file, read_torch_file

__all__ = ["load_stock_model", "load_stock_optimizer"]


def load_stock_model(path: Path, index: int, model: nn.Module, *, strict: bool, no_dist: bool) -> None:
    """Load a model from a stock checkpoint. All ranks call this."""
    part = path / layout.model_part(index)
    if is_committed(part):
        options = StateDictOptions(strict=strict)
        state = {"model": own_model_state(model, options=options, hint=f"This is {part}.")}
        load_state(state, part, no_dist=no_dist)
        set_model_state_dict(model, state["model"], options=StateDictOptions(strict=strict))
        return
    ending = f"_{index}" if index else ""
    names = [f"{SAFE_MODEL_NAME}{ending}.safetensors", f"{MODEL_NAME}{ending}.bin", f"{FSDP_MODEL_NAME}{ending}.bin"]
    weights = _under_the_models_names(_read_weights(path, names, part), model)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=strict))


def load_stock_optimizer(
    path: Path, index: int, optimizer: Optimizer, models: Sequence[nn.Module], *, no_dist: bool
) -> None:
    """Load an optimizer's state from a stock checkpoint. All ranks call this."""
    part = path / layout.optimizer_part(index)
    owner = owner_of(optimizer, models)
    if is_committed(part):
        state = {"optimizer": own_optimizer_state(owner, optimizer)}
        load_state(state, part, no_dist=no_dist)
        restore_optimizer_state(owner, optimizer, state["optimizer"])
        return
    name = f"{OPTIMIZER_NAME}_{index}.bin" if index else f"{OPTIMIZER_NAME}.bin"
    read = _read_weights(path, [name], part)
    if not read.keys() >= {"state", "param_groups"}:
        raise CorruptCheckpointError(
            f"{path / name} holds {listing(map(str, read))}, expected the state and param_groups of an optimizer"
        )
    try:
        saved = by_name(read, owner, optimizer)
    except (KeyError, TypeError, AttributeError) as exc:
        raise CorruptCheckpointError(f"{path / name} does not hold an optimizer's state: {exc!r}") from exc
    restore_optimizer_state(owner, optimizer, saved, options=StateDictOptions(full_state_dict=True))


def _read_weights(path: Path, names: Sequence[str], part: Path) -> dict[str, Any]:
    for name in names:
        file = path / name
        if file.is_file():
            if file.suffix == ".safetensors":
                return read_safetensors_file(file)
            loaded: Any = read_torch_file(file)
            if not isinstance(loaded, Mapping):
                raise CorruptCheckpointError(f"{file} holds a {type(loaded).__name__}, expected a state dict")
            return dict(loaded)
    ours = sorted(entry.name for entry in path.glob(f"{part.name}_rank*"))
    hint = (
        f" Found {listing(ours)}: shards that only as many processes load as saved them, with stock Accelerate."
        if ours
        else ""
    )
    raise PlanError(f"Expected {part.name}/.metadata or {listing(names)} in {path}, found none of them.{hint}")


def _under_the_models_names(weights: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Drop what DDP and torch.compile put before names, and fill in names of shared tensors, which are saved once."""
    names = names_of(model)
    wanted = get_model_state_dict(model).keys()
    found = {names.canonical(key): value for key, value in weights.items()}
    for prefix in ("module.", "_orig_mod."):
        if not found.keys() & wanted and all(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    for missing in wanted - found.keys():
        shared = [name for name in names.tied([missing])[missing] if name in found]
        if shared:
            found[missing] = found[shared[0]]
    return found
