"""What the strategies for FSDP1 of the Trainer and of Fabric have in common: process groups, wrapping, precision.

What differs from stock: the blocks that repeat are units by default, ranks start from rank 0's values, hybrid sharding
needs no more than its name, and the CPU is a device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from lightning.fabric.strategies.fsdp import _move_torchmetrics_to_device, _setup_activation_checkpointing
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import enable_wrap

from dcp_plugins.errors import listing
from dcp_plugins.lightning.wrapping import warn_of_parameters_left_out, wrap_module, wrapper_of

__all__ = ["OnAnyDevice", "WrapsWithFSDP1", "as_policy", "as_sharding_strategy", "refuse_full_state_dicts"]

_HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)


class WrapsWithFSDP1:
    """Mixed in before one of Lightning's ``FSDPStrategy`` classes."""

    sharding_strategy: ShardingStrategy
    cpu_offload: Any
    mixed_precision_config: Any
    root_device: Any
    num_nodes: Any
    num_processes: Any
    world_size: Any
    _activation_checkpointing_kwargs: dict[str, Any]
    _is_called: ClassVar[bool]
    """Whether what is set up is itself called, or its children are."""

    @property
    def _fsdp_options(self) -> dict[str, Any]:
        """The strategy's keyword arguments for ``FullyShardedDataParallel``, to be changed in place."""
        raise NotImplementedError

    def _set_up_groups(self, precision: str, set_up_environment: Callable[[], None]) -> None:
        """Run the parent's ``setup_environment``, and make the mesh of hybrid sharding on this device."""
        if self.root_device.type == "cpu" and precision == "16-mixed":
            raise ValueError(
                f"{type(self).__name__} cannot train with precision='16-mixed' on the CPU, where gradients cannot be"
                " scaled. Use precision='bf16-mixed'."
            )
        options = self._fsdp_options
        sizes: tuple[int, ...] | None = None
        if isinstance(options.get("device_mesh"), tuple):
            # The parent would make it a mesh of CUDA devices.
            sizes = options.pop("device_mesh")
        elif self.sharding_strategy in _HYBRID and not {"device_mesh", "process_group"} & options.keys():
            sizes = (self.num_nodes, self.num_processes)
        set_up_environment()
        if sizes is not None:
            options["device_mesh"] = init_device_mesh(self.root_device.type, sizes)
        self._refuse_hybrid_groups_of_one()

    def _refuse_hybrid_groups_of_one(self) -> None:
        if self.sharding_strategy not in _HYBRID:
            return
        replicate, shard = self._groups()
        if dist.get_world_size(shard) == 1 and dist.get_world_size(replicate) > 1:
            # torch falls back to NO_SHARD in the sharding group alone: replicas would drift apart without a word.
            raise ValueError(
                f"{self.sharding_strategy.name} would shard over 1 rank and replicate over"
                f" {dist.get_world_size(replicate)}, and FSDP1 does not average gradients then. Use strategy='dcp_ddp',"
                " or device_mesh=(replicas, shards) with more than one shard."
            )

    def _groups(self) -> list[dist.ProcessGroup | None]:
        """The groups of this rank that hold the same model between them, those that replicate shards first."""
        options = self._fsdp_options
        mesh, group = options.get("device_mesh"), options.get("process_group")
        if isinstance(mesh, DeviceMesh):
            return [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
        if isinstance(group, tuple):
            return [group[1], group[0]]
        return [group]

    def _is_wrapped(self, model: nn.Module) -> bool:
        """Tell whether somebody has wrapped the model, or modules in it."""
        is_wrapped = any(isinstance(child, FullyShardedDataParallel) for child in model.modules())
        return is_wrapped or wrapper_of(model) is not None

    def _wrap(self, model: nn.Module) -> nn.Module:
        """Wrap a model, unless that has been done; instead of the parent's way, which knows no CPU."""
        root = wrapper_of(model)
        if root is not None:
            # It has been set up before. Wrapped anew, its shards would be taken for parameters.
            return root
        fully_sharded = [name or "(root)" for name, child in model.named_modules() if isinstance(child, FSDPModule)]
        if fully_sharded:
            raise TypeError(
                f"{type(self).__name__} found modules sharded with fully_shard (FSDP2): {listing(fully_sharded)}. It"
                " wraps with FullyShardedDataParallel (FSDP1): remove the fully_shard calls, or train with"
                " strategy='dcp_fsdp2'."
            )
        if self._is_wrapped(model):
            root = model
            if self.world_size > 1:
                warn_of_parameters_left_out(model)
        else:
            options = self._wrap_options
            synchronised = self._groups() if options.pop("sync_module_states", True) else []
            root = wrap_module(model, synchronised, self.root_device, options, is_called=self._is_called)
        # Lightning's own, private helpers: what happens to metrics and activations must not differ from its strategy.
        _move_torchmetrics_to_device(root, self.root_device)
        _setup_activation_checkpointing(root, self._activation_checkpointing_kwargs)
        return root

    @property
    def _wrap_options(self) -> dict[str, Any]:
        return {
            # On the CPU parameters are where they would be offloaded to, and torch fails to pin them.
            "cpu_offload": None if self.root_device.type == "cpu" else self.cpu_offload,
            "mixed_precision": self.mixed_precision_config,
            "sharding_strategy": self.sharding_strategy,
            # By its index, as the parent has it, the CPU would mean no device.
            "device_id": self.root_device,
            **self._fsdp_options,
        }

    @contextmanager
    def _wrapping_by_hand(self) -> Iterator[None]:
        """Let ``torch.distributed.fsdp.wrap.wrap`` wrap with the strategy's options."""
        with enable_wrap(wrapper_cls=FullyShardedDataParallel, **self._wrap_options):
            yield


class _HasDevice(Protocol):
    @property
    def root_device(self) -> torch.device: ...


class OnAnyDevice:
    """Mixed in before one of Lightning's ``FSDPPrecision`` classes, which know of one device only.

    Args:
        plain: What Lightning has made; its state is taken over.
        strategy: Whose device it is.
    """

    precision: Any
    _desired_input_dtype: torch.dtype

    def __init__(self, plain: Any, strategy: _HasDevice) -> None:
        # A copy: the original's constructor would make another scaler.
        self.__dict__.update(plain.__dict__)
        self._strategy = strategy

    @property
    def _leaves_units_alone(self) -> bool:
        """Whether mixed precision is left to autocast, as under the other flags.

        On the CPU, units would hand parameters in half precision to kernels that refuse them beside activations in full
        precision.
        """
        return "mixed" in self.precision and self._strategy.root_device.type == "cpu"

    def forward_context(self) -> AbstractContextManager[Any]:
        if "mixed" not in self.precision:
            return _DtypeContextManager(self._desired_input_dtype)
        dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
        return torch.autocast(self._strategy.root_device.type, dtype=dtype)

    def _mixed_precision(self, parents: Callable[[], Any]) -> MixedPrecision:
        config: MixedPrecision = MixedPrecision() if self._leaves_units_alone else parents()
        return config


def as_policy(policy: Collection[type[nn.Module]] | Callable[..., Any] | None) -> Any:
    """Return a policy as Lightning takes it: of collections, sets only."""
    return set(policy) if isinstance(policy, Collection) else policy


def as_sharding_strategy(value: ShardingStrategy | str, options: dict[str, Any]) -> ShardingStrategy:
    """Return the member of that name.

    Args:
        value: A member or its name.
        options: Those for ``FullyShardedDataParallel``, which must agree with it.

    Raises:
        ValueError: There is no such member, or the options contradict it.
    """
    if not isinstance(value, ShardingStrategy):
        known = {member.name: member for member in ShardingStrategy}
        if value.upper() not in known:
            raise ValueError(f"sharding_strategy must be one of {listing(known)}, found {value!r}.")
        value = known[value.upper()]
    if isinstance(options.get("device_mesh"), tuple) and value not in _HYBRID:
        raise ValueError(
            f"device_mesh={options['device_mesh']} gives the sizes to replicate and to shard over, which needs"
            f" sharding_strategy='HYBRID_SHARD', found {value.name!r}. Leave one of them out."
        )
    return value


def refuse_full_state_dicts(name: str, state_dict_type: str) -> None:
    """Raise unless checkpoints are to be sharded, as all of this package are."""
    if state_dict_type != "sharded":
        raise ValueError(
            f"{name} saves sharded directories, expected state_dict_type='sharded' or none, found {state_dict_type!r}."
            " For one file with full tensors, use dcp_plugins.lightning.consolidate(directory, file), or train with"
            " stock FSDPStrategy."
        )
