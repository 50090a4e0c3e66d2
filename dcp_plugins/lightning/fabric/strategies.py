"""The strategies for Fabric, under the same flags as those for the Trainer, and their registration.

Fabric looks flags up in a registry of its own, in which each strategy has the name of its counterpart for the Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.fabric.plugins.precision import Precision
from lightning.fabric.plugins.precision.fsdp import FSDPPrecision
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy
from torch.optim import Optimizer

from dcp_plugins.errors import listing
from dcp_plugins.lightning.fabric.checkpoints import SavesOnEveryRank
from dcp_plugins.lightning.fsdp1_units import (
    OnAnyDevice,
    WrapsWithFSDP1,
    as_policy,
    as_sharding_strategy,
    refuse_full_state_dicts,
)
from dcp_plugins.lightning.sharding import AutoWrapPolicy, is_sharded, shard_module
from dcp_plugins.manager.options import Asynchronous

__all__ = [
    "DCPDDPStrategy",
    "DCPFSDP2Strategy",
    "DCPFSDPStrategy",
    "DCPSingleDeviceStrategy",
    "register_strategies",
]


class DCPSingleDeviceStrategy(SavesOnEveryRank, SingleDeviceStrategy):
    """The flag ``dcp``: one process on one device, whichever the accelerator has."""

    _single_process = True
    _returns_tensors = True

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The one device, once Fabric has chosen it: it hands devices to a strategy that has this attribute."""
        return getattr(self, "_chosen_devices", None)

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) > 1:
            raise ValueError(
                f"Fabric(strategy='dcp') trains on one device, got {len(devices)}: {devices}. Set devices=1, or use"
                " strategy='dcp_ddp', 'dcp_fsdp' or 'dcp_fsdp2'."
            )
        self._chosen_devices = devices
        self._root_device = devices[0]


class DCPDDPStrategy(SavesOnEveryRank, DDPStrategy):
    """The flag ``dcp_ddp``: ``DDPStrategy`` with its options; each rank writes a share of the parameters."""

    _returns_tensors = True


# Stock's property raises: its sharded strategies go past the CheckpointIO.
class DCPFSDPStrategy(SavesOnEveryRank, WrapsWithFSDP1, FSDPStrategy):  # type: ignore[misc]
    """The flag ``dcp_fsdp``: ``FSDPStrategy`` with its options, on any accelerator or the CPU.

    What is wrapped already is left as it is. Stock ``FSDPStrategy`` loads the directories, and this loads its.

    Args:
        auto_wrap_policy: Which submodules become units of FSDP1: classes, or a policy as ``FullyShardedDataParallel``
            takes it. By default the blocks that repeat; an empty set makes the whole model one unit.
        sharding_strategy: As in ``FSDPStrategy``. Hybrid sharding needs no more than its name.
        state_dict_type: "sharded", the only one there is.
        options: All others of ``FSDPStrategy``, and of ``FullyShardedDataParallel``. ``sync_module_states`` is on
            unless it is set to False: ranks start from rank 0's values. ``asynchronous=True`` saves in the background.
    """

    _is_called = True

    def __init__(
        self,
        *,
        auto_wrap_policy: Collection[type[nn.Module]] | Callable[..., Any] | None = None,
        sharding_strategy: ShardingStrategy | str = ShardingStrategy.FULL_SHARD,
        state_dict_type: Literal["sharded"] = "sharded",
        **options: Any,
    ) -> None:
        refuse_full_state_dicts(type(self).__name__, state_dict_type)
        # The parent would refuse hybrid sharding whose groups are not spelled out: it is told afterwards.
        super().__init__(auto_wrap_policy=as_policy(auto_wrap_policy), state_dict_type=state_dict_type, **options)
        self.sharding_strategy = as_sharding_strategy(sharding_strategy, self._fsdp_kwargs)

    @property
    def precision(self) -> FSDPPrecision:
        plugin = self._precision
        assert plugin is None or isinstance(plugin, FSDPPrecision)
        return _DCPFSDPPrecision(FSDPPrecision("32-true"), self) if plugin is None else plugin

    @precision.setter
    def precision(self, plugin: Precision | None) -> None:
        if plugin is not None and not isinstance(plugin, FSDPPrecision):
            raise TypeError(
                f"{type(self).__name__} needs an FSDPPrecision, found {type(plugin).__name__}. Pass"
                " Fabric(precision=...) and leave the plugin out."
            )
        # A subclass is the user's own and stays.
        self._precision = _DCPFSDPPrecision(plugin, self) if type(plugin) is FSDPPrecision else plugin

    @property
    def _fsdp_options(self) -> dict[str, Any]:
        options: dict[str, Any] = self._fsdp_kwargs
        return options

    def setup_environment(self) -> None:
        self._set_up_groups(self.precision.precision, super().setup_environment)

    def setup_module(self, module: nn.Module) -> nn.Module:
        root = self._wrap(module)
        self._note_module(root)
        return root

    def module_sharded_context(self) -> AbstractContextManager[None]:
        """Let ``torch.distributed.fsdp.wrap.wrap`` wrap with the strategy's options."""
        return self._wrapping_by_hand()


class _DCPFSDPPrecision(OnAnyDevice, FSDPPrecision):
    """Lightning's precision for FSDP1, knowing the device."""

    @property
    def mixed_precision_config(self) -> MixedPrecision:
        return self._mixed_precision(lambda: super(OnAnyDevice, self).mixed_precision_config)


class DCPFSDP2Strategy(SavesOnEveryRank, ModelParallelStrategy):  # type: ignore[misc]
    """The flag ``dcp_fsdp2``: ``ModelParallelStrategy`` that shards with FSDP2 by itself.

    A module that is sharded already, by its author or by ``parallelize_fn``, is left as it is. Any other is sharded
    over all ranks: the module as a whole, and in it the blocks that repeat. Optimizers that are set up together with it
    train the shards from then on.

    Args:
        parallelize_fn: As in ``ModelParallelStrategy``; by default nothing is done to the module before it is sharded.
        data_parallel_size: Number of ranks that parameters are sharded over; "auto" is all that tensor parallelism
            leaves. (Stock ``ModelParallelStrategy`` gives all ranks of a node to tensor parallelism.)
        tensor_parallel_size: Number of ranks for tensor parallelism, which ``parallelize_fn`` applies.
        auto_wrap_policy: Which submodules become units of FSDP2: classes, or a predicate.
        reshard_after_forward: As ``fully_shard`` has it.
        mp_policy: As ``fully_shard`` has it.
        offload_policy: As ``fully_shard`` has it.
        process_group_backend: As in ``ModelParallelStrategy``.
        timeout: Of the process group; None takes Lightning's default.
        asynchronous: As in the other strategies; so are those that follow.
        thread_count: As in `DCPCheckpointIO`.
        sync_files: As in `DCPCheckpointIO`.
        overlap_staging: As in `DCPCheckpointIO`.
    """

    def __init__(
        self,
        parallelize_fn: Callable[[Any, DeviceMesh], Any] | None = None,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        *,
        auto_wrap_policy: AutoWrapPolicy | None = None,
        reshard_after_forward: bool | int | None = None,
        mp_policy: Any | None = None,
        offload_policy: Any | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        asynchronous: bool | Asynchronous | None = None,
        thread_count: int | None = None,
        sync_files: bool | None = None,
        overlap_staging: bool | None = None,
    ) -> None:
        self._first_parallelize = parallelize_fn
        super().__init__(
            parallelize_fn=self._parallelize,
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            process_group_backend=process_group_backend,
            asynchronous=asynchronous,
            thread_count=thread_count,
            sync_files=sync_files,
            overlap_staging=overlap_staging,
        )
        if timeout is not None:
            self._timeout = timeout
        self._auto_wrap_policy = auto_wrap_policy
        options = {
            "reshard_after_forward": reshard_after_forward,
            "mp_policy": mp_policy,
            "offload_policy": offload_policy,
        }
        self._shard_options = {name: value for name, value in options.items() if value is not None}

    def setup_environment(self) -> None:
        if self._data_parallel_size == "auto":
            assert isinstance(self._tensor_parallel_size, int)
            self._data_parallel_size = max(1, self.num_nodes * self.num_processes // self._tensor_parallel_size)
        super().setup_environment()

    def _parallelize(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        if self._first_parallelize is not None:
            module = self._first_parallelize(module, mesh)
        if isinstance(module, nn.Module) and not is_sharded(module):
            shard_module(
                module,
                mesh["data_parallel"],
                policy=self._auto_wrap_policy,
                options=self._shard_options,
                is_called=True,
            )
        return module

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any | None = None
    ) -> tuple[nn.Module, list[Optimizer], Any | None]:
        names = {parameter: name for name, parameter in module.named_parameters(remove_duplicate=False)}
        module, optimizers, scheduler = super().setup_module_and_optimizers(module, optimizers, scheduler)
        shards = dict(module.named_parameters(remove_duplicate=False))
        for optimizer in optimizers:
            _train_instead(optimizer, names, shards)
        return module, optimizers, scheduler


def _train_instead(optimizer: Optimizer, names: dict[nn.Parameter, str], shards: dict[str, nn.Parameter]) -> None:
    """Let an optimizer that was made for a module train the parameters that sharding has put in their places.

    Raises:
        ValueError: A parameter has no successor, or the optimizer has state that belongs to whole parameters.
    """
    everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    replaced = [one for one in everything if one in names and shards.get(names[one]) is not one]
    lost = [names[one] for one in replaced if names[one] not in shards]
    used = [names[one] for one in replaced if optimizer.state.get(one)]
    if lost or used:
        what = f"finds no successor of {listing(lost)}" if lost else f"has stepped before, with {listing(used)}"
        raise ValueError(
            f"fabric.setup(module, optimizer) shards the parameters, and {type(optimizer).__name__} {what}. Set up"
            " the module first, make the optimizer of the parameters that it has then, and set that up with"
            " fabric.setup_optimizers."
        )
    for group in optimizer.param_groups:
        group["params"] = [shards[names[one]] if one in names else one for one in group["params"]]


def register_strategies() -> None:
    """Make the flags known to Fabric. Done when ``dcp_plugins.lightning`` is imported."""
    for name, strategy, description in (
        ("dcp", DCPSingleDeviceStrategy, "One device, checkpoints by dcp_plugins"),
        ("dcp_ddp", DCPDDPStrategy, "DDP, checkpoints by dcp_plugins written by every rank"),
        ("dcp_fsdp", DCPFSDPStrategy, "FSDP1 applied to the module's blocks, sharded checkpoints by dcp_plugins"),
        ("dcp_fsdp2", DCPFSDP2Strategy, "FSDP2 applied to the module's blocks, sharded checkpoints by dcp_plugins"),
    ):
        STRATEGY_REGISTRY.register(name, strategy, description=description, override=True)
        in_background = f"{description}, in the background"
        STRATEGY_REGISTRY.register(
            f"{name}_async", strategy, description=in_background, override=True, asynchronous=True
        )
