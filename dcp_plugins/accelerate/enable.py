"""Where this package takes the place of ``save_state`` and ``load_state`` in a stock ``Accelerator``, and leaves it.

Accelerate's hooks come too late: under FSDP models and optimizers are written before the save hooks run, and optimizers
are never handed to a hook. So methods are rebound, on the one instance: ``save_state`` and ``load_state``, and two that
must finish the save in flight, ``end_training`` and ``free_memory``. What they need of Accelerate beyond its public
interface is listed here, and looked for before anything is changed.
"""

from __future__ import annotations

import importlib.metadata
import inspect

from accelerate import Accelerator, checkpointing
from accelerate.utils import DistributedType

from dcp_plugins.accelerate.checkpointer import Checkpointer
from dcp_plugins.accelerate.plugin import DCPPlugin
from dcp_plugins.errors import MissingExtraError, listing

__all__ = ["disable", "enable"]

_METHODS = ("save_state", "load_state", "end_training", "free_memory")

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
    kind = type(accelerator)
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
    earlier = _checkpointer_of(accelerator)
    checkpointer = Checkpointer(accelerator, plugin)
    for name in _METHODS:
        setattr(accelerator, name, getattr(checkpointer, name))
    if earlier is not None:
        # It raises if the save in flight failed. The accelerator is not left to stock then.
        earlier.close()
    return accelerator


def disable(accelerator: Accelerator) -> Accelerator:
    """Finish the save in flight, give the accelerator its own methods back, and return it; without effect on others."""
    checkpointer = _checkpointer_of(accelerator)
    if checkpointer is not None:
        for name in _METHODS:
            delattr(accelerator, name)
        checkpointer.close()
    return accelerator


def _checkpointer_of(accelerator: Accelerator) -> Checkpointer | None:
    owner = getattr(accelerator.save_state, "__self__", None)
    return owner if isinstance(owner, Checkpointer) else None


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
