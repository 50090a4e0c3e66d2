"""Replace ``save_state`` and ``load_state`` of a stock ``Accelerator`` by those of this package, and undo it.

Accelerate's hooks come too late: under FSDP models and optimizers are written before the save hooks run, and optimizers
are never handed to a hook. So the one instance gets a subclass of its class, which overrides ``save_state`` and
``load_state``, and two methods that must finish the save in flight, ``end_training`` and ``free_memory``. This module
lists what these methods need of Accelerate's private interface, and checks it before it changes anything.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator, checkpointing
from accelerate.utils import DistributedType
from torch import nn

from dcp_plugins.accelerate.checkpointer import Checkpointer
from dcp_plugins.accelerate.plugin import DCPPlugin
from dcp_plugins.errors import MissingExtraError, listing

__all__ = ["disable", "enable"]

_CHECKPOINTER = "_dcp_plugins_checkpointer"

_ATTRIBUTES = (
    *("_models", "_optimizers", "_schedulers", "_dataloaders", "_custom_objects", "scaler", "step"),
    *("_save_model_state_pre_hook", "_load_model_state_pre_hook", "project_configuration"),
)
_PARAMETERS = {
    checkpointing.save_accelerator_state: "output_dir model_states optimizers schedulers dataloaders process_index step"
    " scaler save_on_each_node",
    checkpointing.load_accelerator_state: "input_dir models optimizers schedulers dataloaders process_index scaler"
    " map_location load_kwargs",
    checkpointing.save_custom_state: "obj path index save_on_each_node",
}
_ELSEWHERE = {DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA}


def enable(accelerator: Accelerator, plugin: DCPPlugin | None = None) -> Accelerator:
    """Let an accelerator save and load through this package, and return it.

    To be called on every process, once; another call changes the options.

    Args:
        accelerator: Of any kind but DeepSpeed, Megatron-LM and XLA, which have checkpoints of their own.
        plugin: How to save. None takes what this process was launched with: see `DCPPlugin.from_launch`.

    Raises:
        CheckpointException: A save that was in flight when the options were changed failed; they are changed.
        ValueError: The accelerator is of another kind, or of a subclass with its own ``save_state`` or ``load_state``;
            or an option is wrong.
        MissingExtraError: This version of Accelerate is not one that this package knows.
    """
    if accelerator.distributed_type in _ELSEWHERE:
        raise ValueError(
            f"dcp_plugins.accelerate saves single processes, DDP and FSDP, found {accelerator.distributed_type}, whose"
            " checkpoints are its own. Leave the call of enable() out."
        )
    _check_seam(accelerator)
    earlier = _checkpointer_of(accelerator)
    kind = type(accelerator) if earlier is None else _stock_class(accelerator)
    overridden = [
        name for name in ("save_state", "load_state") if getattr(kind, name) is not getattr(Accelerator, name)
    ]
    if overridden:
        raise ValueError(
            f"{kind.__name__} has its own {listing(overridden)}, which enable() would shadow: they would no longer be"
            " called. Do what they add in hooks (register_save_state_pre_hook, register_load_state_pre_hook), or around"
            " the calls."
        )
    plugin = DCPPlugin.from_launch() if plugin is None else plugin
    setattr(accelerator, _CHECKPOINTER, Checkpointer(accelerator, plugin))
    accelerator.__class__ = _enabled_class(kind)  # type: ignore[arg-type]
    if earlier is not None:
        # `close` raises if the save in flight failed. The accelerator already has its new checkpointer then.
        earlier.close()
    return accelerator


def disable(accelerator: Accelerator) -> Accelerator:
    """Finish the save in flight, give the accelerator its own methods back, and return it; without effect on others."""
    checkpointer = _checkpointer_of(accelerator)
    if checkpointer is not None:
        accelerator.__class__ = _stock_class(accelerator)
        delattr(accelerator, _CHECKPOINTER)
        checkpointer.close()
    return accelerator


def _delegated(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        return method(_checkpointer_of(self), *args, **kwargs)

    return call


class _Enabled(Accelerator):  # type: ignore[misc]
    """The methods of an enabled accelerator. As attributes of the instance they would make a reference cycle."""

    save_state = _delegated(Checkpointer.save_state)
    load_state = _delegated(Checkpointer.load_state)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Call stock's method, and note DDP's wrapper: the accelerator keeps the model inside it only."""
        prepared: nn.Module = super().prepare_model(model, device_placement, evaluation_mode)
        checkpointer = _checkpointer_of(self)
        assert checkpointer is not None
        checkpointer.note_prepared(prepared)
        return prepared

    def end_training(self) -> None:
        """Finish the save in flight, then call stock's method; raise a save's failure on every process."""
        try:
            _close(self)
        finally:
            super().end_training()

    def free_memory(self, *objects: Any) -> Any:
        """Finish the save in flight, which refers to the optimizers, free its memory, and call stock's method."""
        try:
            _close(self)
        finally:
            released = super().free_memory(*objects)
        return released

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle cannot find this class by its name. The saves in flight stay with this accelerator.
        checkpointer = _checkpointer_of(self)
        assert checkpointer is not None
        state = {name: value for name, value in self.__dict__.items() if name != _CHECKPOINTER}
        return _enabled_copy, (_stock_class(self), state, checkpointer.plugin)


def _enabled_copy(kind: type[Accelerator], state: dict[str, Any], plugin: DCPPlugin) -> Accelerator:
    """Return an enabled accelerator with the attributes of another one."""
    accelerator: Accelerator = object.__new__(kind)
    accelerator.__dict__.update(state)
    return enable(accelerator, plugin)


@functools.cache
def _enabled_class(kind: type[Accelerator]) -> type[Accelerator]:
    """Return the subclass of ``kind`` that enabled accelerators get. Its name is that of ``kind``."""
    return type(kind.__name__, (_Enabled, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _stock_class(accelerator: Accelerator) -> type[Accelerator]:
    """Return the class that an enabled accelerator had before `enable`."""
    kind: type[Accelerator] = type(accelerator).__bases__[1]
    return kind


def _close(accelerator: Accelerator) -> None:
    checkpointer = _checkpointer_of(accelerator)
    assert checkpointer is not None
    checkpointer.close()


def _checkpointer_of(accelerator: Accelerator) -> Checkpointer | None:
    return getattr(accelerator, _CHECKPOINTER, None)


def _check_seam(accelerator: Accelerator) -> None:
    missing = [f"Accelerator.{name}" for name in _ATTRIBUTES if not hasattr(accelerator, name)]
    for function, names in _PARAMETERS.items():
        lacking = set(names.split()) - inspect.signature(function).parameters.keys()
        missing += [f"{function.__name__}({name})" for name in lacking]
    if missing:
        version = importlib.metadata.version("accelerate")
        raise MissingExtraError(
            f"dcp_plugins.accelerate does not know Accelerate {version}, where it misses {listing(missing)}. Install"
            " the versions it is tested with: pip install 'dcp_plugins[accelerate]'"
        )
