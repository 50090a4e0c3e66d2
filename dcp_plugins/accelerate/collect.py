"""The state of an ``Accelerator``: models, optimizers by the names of parameters, and small files.

Accelerate's own functions write schedulers, samplers, scaler, random states and registered objects into a temporary
directory, and read them from one. The small files are so the same as stock Accelerate's, on every device it supports.

Optimizers are saved with the state that they have. A load is driven by the checkpoint's keys: it allocates the saved
state of an optimizer that has not stepped yet.
"""

from __future__ import annotations

import fnmatch
import io
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state, save_custom_state
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from accelerate.utils.constants import RNG_STATE_NAME, SAMPLER_NAME, SCALER_NAME, SCHEDULER_NAME
from accelerate.utils.other import load as load_file
from torch import nn
from torch.optim import Optimizer

from dcp_plugins.accelerate import layout
from dcp_plugins.accelerate.layout import Contents
from dcp_plugins.errors import CorruptCheckpointError, PlanError, UnsafeCheckpointError, UnsupportedValueError, listing
from dcp_plugins.format.trust import SafeGlobal
from dcp_plugins.manager.diverging import Replicas
from dcp_plugins.plan.flatten import KeyPath
from dcp_plugins.plan.unloadable import warn_of_unloadable
from dcp_plugins.plan.values import load_value
from dcp_plugins.state_dict import StateDictOptions, get_model_state_dict
from dcp_plugins.state_dict.names import names_of
from dcp_plugins.state_dict.owned import own_model_state, own_optimizer_state
from dcp_plugins.storage.regular import read_regular

_HOW_TO_TRUST = (
    "weights_only=False in DCPPlugin or its section of the YAML file, or load_kwargs={'weights_only': False}"
)
# A registered object's state may be of any type. A sampler's file holds the sampler itself.
_WITH_ANY_VALUE = ("custom_checkpoint_", SAMPLER_NAME)
_SMALL_FILES = (
    f"{SCHEDULER_NAME}*.bin",
    f"{SAMPLER_NAME}*.bin",
    "dl_state_dict*.bin",
    SCALER_NAME,
    f"{RNG_STATE_NAME}_*.pkl",
    "custom_checkpoint_*.pkl",
)

__all__ = [
    "check_files",
    "diverging_in",
    "is_fsdp",
    "optimizers_of",
    "owner_of",
    "restore_files",
    "small_files",
    "state_of",
    "wanted_of",
    "weights_of",
]


def is_fsdp(accelerator: Accelerator) -> bool:
    """Tell whether the accelerator uses FSDP: Accelerate then gives the hooks no models and no state dicts."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def optimizers_of(accelerator: Accelerator) -> list[Optimizer]:
    """Return the prepared optimizers without Accelerate's wrappers."""
    return [
        optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        for optimizer in accelerator._optimizers
    ]


def owner_of(optimizer: Optimizer, models: Sequence[nn.Module]) -> nn.Module:
    """Return the model of an optimizer's parameters; a module around several models, or around loose parameters."""
    walked = [names_of(model) for model in models]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    owners = [index for index, names in enumerate(walked) if any(names.fqns(parameter) for parameter in parameters)]
    loose = [parameter for parameter in parameters if not any(names.fqns(parameter) for names in walked)]
    if len(owners) == 1 and not loose:
        return models[owners[0]]
    together = nn.Module()
    for index in owners:
        together.add_module(str(index), models[index])
    if loose:
        # Plain tensors, which no module can have as parameters, are named by the optimizer's own state.
        own = [parameter for parameter in loose if isinstance(parameter, nn.Parameter)]
        together.add_module("parameters_of_no_model", nn.ParameterList(own))
    return together


def weights_of(accelerator: Accelerator) -> list[dict[str, Any]]:
    """Return the state dicts that Accelerate gives to hooks: none under FSDP."""
    if is_fsdp(accelerator):
        return []
    return [accelerator.get_state_dict(model, unwrap=False) for model in accelerator._models]


def state_of(
    accelerator: Accelerator, shown: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]], left: Sequence[Any]
) -> dict[str, Any]:
    """Return the state dict to save.

    Args:
        accelerator: With everything that was prepared and registered.
        shown: The state dicts that `weights_of` returned.
        before: Copies of these state dicts, made before the hooks ran.
        left: The list after the hooks: a hook removes the state dicts that it saves itself.
    """
    models = accelerator._models
    state: dict[str, Any] = {}
    if is_fsdp(accelerator):
        saved: list[Any] = [get_model_state_dict(model) for model in models]
    else:
        saved = []
        for place, weights in enumerate(left):
            index = next((index for index, original in enumerate(shown) if original is weights), None)
            model = models[place if index is None else index]
            is_untouched = index is not None and _are_same(weights, before[index])
            names = names_of(model)
            saved.append(
                get_model_state_dict(model)
                if is_untouched
                else {names.canonical(key): value for key, value in weights.items()}
            )
    for index, model_state in enumerate(saved):
        state[layout.model_part(index)] = {"model": model_state}
    for index, optimizer in enumerate(optimizers_of(accelerator)):
        optimizer_state = own_optimizer_state(owner_of(optimizer, models), optimizer)
        state[layout.optimizer_part(index)] = {"optimizer": optimizer_state}
    state[layout.REST] = {str(accelerator.process_index): small_files(accelerator)}
    return state


def diverging_in(
    accelerator: Accelerator, prepared: Iterable[nn.Module], state: Mapping[str, Any]
) -> Iterator[KeyPath]:
    """Yield the paths of values that processes may hold with different contents: stock saves the main process's.

    Args:
        accelerator: With everything that was prepared.
        prepared: The prepared models in DDP's wrappers, as far as they are known.
        state: The result of `state_of`.
    """
    parts = [layout.model_part(index) for index in range(len(accelerator._models))]
    models = (((part, "model"), state.get(part, {}).get("model", {})) for part in parts)
    optimizers = (
        ((layout.optimizer_part(index),), optimizer) for index, optimizer in enumerate(optimizers_of(accelerator))
    )
    yield from Replicas([*accelerator._models, *prepared]).diverging(models, optimizers)


def _are_same(weights: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return weights.keys() == before.keys() and all(value is before[key] for key, value in weights.items())


class _Recorded:
    """Stands for an object while Accelerate saves it: returns the object's state, and keeps it for the warning."""

    def __init__(self, value: Any, name: str, seen: dict[str, Any]) -> None:
        self._value = value
        self._name = name
        self._seen = seen

    def state_dict(self) -> Any:
        state = self._seen[self._name] = self._value.state_dict()
        return state


def small_files(accelerator: Accelerator) -> dict[str, bytes]:
    """Return the files that stock Accelerate writes on this process beside models and optimizers, by name."""
    seen: dict[str, Any] = {}
    schedulers = [
        _Recorded(one, f"the scheduler {index}, a {type(one).__name__}", seen)
        for index, one in enumerate(accelerator._schedulers)
    ]
    with tempfile.TemporaryDirectory(prefix="dcp_accelerate_") as folder:
        save_accelerator_state(
            folder,
            [],
            [],
            schedulers,
            accelerator._dataloaders,
            accelerator.process_index,
            accelerator.step,
            accelerator.scaler,
        )
        for index, value in enumerate(accelerator._custom_objects):
            save_custom_state(
                _Recorded(value, f"the registered object {index}, a {type(value).__name__}", seen), folder, index
            )
        warn_of_unloadable(seen, _HOW_TO_TRUST, are_pickled=True)
        return {layout.check_file_name(path.name): path.read_bytes() for path in Path(folder).iterdir()}


def check_files(accelerator: Accelerator, names: Iterable[str], path: Path) -> None:
    """Check that a checkpoint has the states of schedulers, scaler and registered objects, before any is changed.

    Raises:
        PlanError: States are missing, or there are states of more objects than are registered; lists all of them.
    """
    names = set(names)
    wanted = {
        f"{SCHEDULER_NAME}_{index}.bin" if index else f"{SCHEDULER_NAME}.bin"
        for index in range(len(accelerator._schedulers))
    }
    if accelerator.scaler is not None:
        wanted.add(SCALER_NAME)
    objects = len(accelerator._custom_objects)
    found = sum(fnmatch.fnmatch(name, "custom_checkpoint_*.pkl") for name in names)
    problems = []
    if wanted - names:
        problems.append(
            f"Expected {listing(wanted - names)} in {path}, found none. Prepare what was prepared when the checkpoint"
            " was saved."
        )
    if found != objects:
        problems.append(
            f"Expected the states of {objects} registered objects in {path}, found {found}."
            " Register the same objects as when it was saved."
        )
    if problems:
        raise PlanError(" ".join(problems))


def restore_files(
    accelerator: Accelerator,
    folder: Path,
    *,
    map_location: Any,
    load_kwargs: Mapping[str, Any],
    weights_only: bool,
    safe_globals: Iterable[SafeGlobal],
) -> None:
    """Restore schedulers, samplers, scaler, random states and registered objects from a directory of their files.

    `check_files` has checked the names of the files before.

    Raises:
        UnsupportedValueError: A state is more than plain data.
    """
    with tempfile.TemporaryDirectory(prefix="dcp_accelerate_") as rewritten:
        if weights_only:
            # Accelerate unpickles files. Give it new files, pickled by this process from the decoded values.
            _rewrite(accelerator, folder, Path(rewritten), safe_globals)
            folder = Path(rewritten)
        _restore_trusted(accelerator, folder, map_location=map_location, load_kwargs=load_kwargs)


def _rewrite(accelerator: Accelerator, folder: Path, target: Path, safe_globals: Iterable[SafeGlobal]) -> None:
    """Decode the small files in a directory as plain data, and write the values into another directory."""
    for path in sorted(folder.iterdir()):
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in _SMALL_FILES):
            continue
        try:
            state = load_value(
                path.name,
                io.BytesIO(read_regular(folder, path.name)),
                weights_only=True,
                safe_globals=safe_globals,
                map_location="cpu",
                how_to_trust=_HOW_TO_TRUST,
                verify_checksums=True,
            )
        except UnsafeCheckpointError as exc:
            if fnmatch.fnmatch(path.name, f"{SAMPLER_NAME}*.bin"):
                # Accelerate pickles the whole sampler into such a file, and reads only few of these files.
                continue
            raise UnsupportedValueError(
                f"The state of {_owner(accelerator, path.name)} is no plain data: {exc}"
            ) from exc
        if not isinstance(state, dict) and not path.name.startswith(_WITH_ANY_VALUE):
            raise CorruptCheckpointError(f"{path} holds a {type(state).__name__}, expected a state dict")
        try:
            torch.save(state, target / path.name)
        except RecursionError as exc:
            raise CorruptCheckpointError(
                f"{path} holds a value that is nested so deeply that no save can have written it"
            ) from exc


def _owner(accelerator: Accelerator, name: str) -> str:
    """Say in words which object's state a file holds."""
    for index, value in enumerate(accelerator._custom_objects):
        if name == f"custom_checkpoint_{index}.pkl":
            return f"the registered object {index}, a {type(value).__name__},"
    return name


def _restore_trusted(
    accelerator: Accelerator, folder: Path, *, map_location: Any, load_kwargs: Mapping[str, Any]
) -> None:
    """Restore from files that may be unpickled."""
    first = folder / f"{RNG_STATE_NAME}_0.pkl"
    try:
        restored = load_accelerator_state(
            str(folder),
            [],
            [],
            accelerator._schedulers,
            accelerator._dataloaders,
            accelerator.process_index,
            accelerator.scaler,
            map_location,
            {**load_kwargs, "weights_only": False},
        )
        if "step" not in restored and first.is_file():
            # Fewer processes saved the checkpoint: this process keeps its random state, but not its step count.
            restored = load_file(first)
    except pickle.UnpicklingError as exc:
        # Accelerate reads random states with a list of classes of its own.
        raise CorruptCheckpointError(
            f"the small files of the checkpoint ({first.name}, {SCHEDULER_NAME}.bin, ...) hold what Accelerate does "
            f"not save: {exc}"
        ) from exc
    accelerator.step = restored.get("step", accelerator.step)
    for index, value in enumerate(accelerator._custom_objects):
        path = folder / f"custom_checkpoint_{index}.pkl"
        value.load_state_dict(load_file(path, map_location="cpu", weights_only=False))


def wanted_of(
    contents: Contents,
    models: Sequence[nn.Module],
    optimizers: Sequence[tuple[nn.Module, Optimizer]],
    *,
    strict: bool,
    path: Path,
) -> dict[str, Any]:
    """Return the state dict of models and optimizers to load into.

    Raises:
        PlanError: The checkpoint lacks a model or an optimizer; lists all of them.
    """
    state: dict[str, Any] = {}
    problems = []
    for index, model in enumerate(models):
        if index not in contents.model_names:
            problems.append(f"model {index} was not saved (a hook may have: register the one that loads it)")
            continue
        options = StateDictOptions(strict=strict)
        hint = f"The checkpoint is {path}. load_state(strict=False) loads the keys that they share."
        state[layout.model_part(index)] = {
            "model": own_model_state(model, options=options, hint=hint, title=f"model {index}")
        }
    for index, (owner, optimizer) in enumerate(optimizers):
        if index not in contents.optimizers:
            problems.append(f"optimizer {index} was not saved")
            continue
        state[layout.optimizer_part(index)] = {"optimizer": own_optimizer_state(owner, optimizer)}
    if problems:
        raise PlanError(
            f"What was prepared is not what the checkpoint {path} holds: {'. '.join(problems)}."
            " load_state(strict=False) loads the keys that they share."
        )
    return state
