"""The flag ``dcp_fsdp``: Lightning's ``FSDPStrategy`` (FSDP1), with checkpoints that every rank writes and reads.

The whole LightningModule is wrapped in one ``FullyShardedDataParallel``, as stock does, so that parameters of its own,
and methods of its children other than ``forward``, work in ``training_step``. What differs from stock besides the
checkpoints: the blocks that repeat are units by default, ranks start from rank 0's values, the CPU is a device,
gradients can be clipped by norm, manual optimization works, and a module that has been fitted can be validated or
fitted again, by any trainer with this flag.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from lightning.fabric.strategies.fsdp import _move_torchmetrics_to_device, _setup_activation_checkpointing
from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import enable_wrap
from torch.optim import Optimizer

from dcp_plugins.errors import listing
from dcp_plugins.lightning.every_rank import CheckpointsOnEveryRank
from dcp_plugins.lightning.sharding import refuse_weight_averaging
from dcp_plugins.lightning.wrapping import parameters_of, warn_of_parameters_left_out, wrap_module, wrapper_of

__all__ = ["DCPFSDPStrategy"]

_HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)


class DCPFSDPStrategy(CheckpointsOnEveryRank, FSDPStrategy):
    """The flag ``dcp_fsdp``: ``FSDPStrategy`` with its options, on any accelerator or the CPU.

    Modules that ``configure_model()`` has wrapped are left as they are, and nothing else is wrapped then. Checkpoints
    are always sharded directories; stock ``FSDPStrategy(state_dict_type="sharded")`` loads them, and ours loads its.

    Args:
        auto_wrap_policy: Which submodules become units of FSDP1: classes, or a policy as ``FullyShardedDataParallel``
            takes it. By default the blocks that repeat; an empty set makes the whole model one unit.
        sharding_strategy: As in ``FSDPStrategy``. Hybrid sharding needs no more than its name: it shards over the
            devices of a node and replicates over nodes, unless ``device_mesh`` says otherwise.
        state_dict_type: "sharded", the only one there is. To have one file with full tensors, load the directory with
            ``DCPCheckpointIO().load_checkpoint(path)`` and pass the result to ``torch.save``.
        options: All others of ``FSDPStrategy``, and of ``FullyShardedDataParallel``. ``sync_module_states`` is on
            unless it is set to False: ranks start from rank 0's values. ``asynchronous=True`` saves in the background.
    """

    _stock_model_key = "model"

    def __init__(
        self,
        *,
        auto_wrap_policy: Collection[type[nn.Module]] | Callable[..., Any] | None = None,
        sharding_strategy: ShardingStrategy | str = ShardingStrategy.FULL_SHARD,
        state_dict_type: Literal["sharded"] = "sharded",
        **options: Any,
    ) -> None:
        if state_dict_type != "sharded":
            raise ValueError(
                f"{type(self).__name__} saves sharded directories, expected state_dict_type='sharded' or none, found"
                f" {state_dict_type!r}. For one file with full tensors, pass what"
                " DCPCheckpointIO().load_checkpoint(directory) returns to torch.save, or train with stock FSDPStrategy."
            )
        if isinstance(auto_wrap_policy, Collection):
            auto_wrap_policy = set(auto_wrap_policy)
        # The parent would refuse hybrid sharding whose groups are not spelled out: it is told afterwards.
        super().__init__(auto_wrap_policy=auto_wrap_policy, state_dict_type=state_dict_type, **options)
        self.sharding_strategy = _as_sharding_strategy(sharding_strategy)
        if isinstance(self.kwargs.get("device_mesh"), tuple) and self.sharding_strategy not in _HYBRID:
            raise ValueError(
                f"device_mesh={self.kwargs['device_mesh']} gives the sizes to replicate and to shard over, which needs"
                f" sharding_strategy='HYBRID_SHARD', found {self.sharding_strategy.name!r}. Leave one of them out."
            )

    @property
    def precision_plugin(self) -> FSDPPrecision:
        plugin = self._precision_plugin
        assert plugin is None or isinstance(plugin, FSDPPrecision)
        return _DCPFSDPPrecision(FSDPPrecision("32-true"), self) if plugin is None else plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and not isinstance(plugin, FSDPPrecision):
            raise TypeError(
                f"{type(self).__name__} needs an FSDPPrecision, found {type(plugin).__name__}. Pass"
                " Trainer(precision=...) and leave the plugin out."
            )
        # A subclass is the user's own and stays.
        self._precision_plugin = _DCPFSDPPrecision(plugin, self) if type(plugin) is FSDPPrecision else plugin

    @property
    def _stateful_module(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def setup_environment(self) -> None:
        if self.root_device.type == "cpu" and self.precision_plugin.precision == "16-mixed":
            raise ValueError(
                f"{type(self).__name__} cannot train with precision='16-mixed' on the CPU, where gradients cannot be"
                " scaled. Use precision='bf16-mixed'."
            )
        sizes: tuple[int, ...] | None = None
        if isinstance(self.kwargs.get("device_mesh"), tuple):
            # The parent would make it a mesh of CUDA devices.
            sizes = self.kwargs.pop("device_mesh")
        elif self.sharding_strategy in _HYBRID and not {"device_mesh", "process_group"} & self.kwargs.keys():
            sizes = (self.num_nodes, self.num_processes)
        super().setup_environment()
        if sizes is not None:
            self.kwargs["device_mesh"] = init_device_mesh(self.root_device.type, sizes)
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
        mesh, group = self.kwargs.get("device_mesh"), self.kwargs.get("process_group")
        if isinstance(mesh, DeviceMesh):
            return [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
        if isinstance(group, tuple):
            return [group[1], group[0]]
        return [group]

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Wrap the LightningModule, unless that has been done; replaces the parent's, which knows no CPU."""
        root = wrapper_of(model)
        if root is not None:
            # It has been fitted or evaluated before. Wrapped anew, its shards would be taken for parameters.
            return root
        fully_sharded = [name or "(root)" for name, child in model.named_modules() if isinstance(child, FSDPModule)]
        if fully_sharded:
            raise TypeError(
                f"{type(self).__name__} found modules sharded with fully_shard (FSDP2): {listing(fully_sharded)}. It"
                " wraps with FullyShardedDataParallel (FSDP1): remove the fully_shard calls, or train with"
                " strategy='dcp_fsdp2'."
            )
        if any(isinstance(child, FullyShardedDataParallel) for child in model.modules()):
            root = model
            if self.world_size > 1:
                warn_of_parameters_left_out(model)
        else:
            assert self.lightning_module is not None
            refuse_weight_averaging(self.lightning_module.trainer)
            options = self._wrap_options
            synchronised = self._groups() if options.pop("sync_module_states", True) else []
            root = wrap_module(model, synchronised, self.root_device, options)
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
            **self.kwargs,
        }

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Let ``torch.distributed.fsdp.wrap.wrap`` in ``configure_model()`` wrap with the strategy's options."""
        with enable_wrap(wrapper_cls=FullyShardedDataParallel, **self._wrap_options):
            yield


class _DCPFSDPPrecision(FSDPPrecision):
    """Lightning's precision for FSDP1, knowing what stock's does not: the device, and the units with the gradients."""

    def __init__(self, plain: FSDPPrecision, strategy: DCPFSDPStrategy) -> None:
        # A copy: the original's constructor would make another scaler.
        self.__dict__.update(plain.__dict__)
        self._strategy = strategy

    @property
    def mixed_precision_config(self) -> MixedPrecision:
        if "mixed" in self.precision and self._strategy.root_device.type == "cpu":
            # Left to autocast, as under the other flags: units would hand parameters in half precision to kernels that,
            # on the CPU, refuse them beside activations in full precision.
            return MixedPrecision()
        return super().mixed_precision_config

    def forward_context(self) -> AbstractContextManager[Any]:
        if "mixed" not in self.precision:
            return _DtypeContextManager(self._desired_input_dtype)
        dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
        return torch.autocast(self._strategy.root_device.type, dtype=dtype)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip the norm of all gradients of an optimizer, each rank's shards and what every rank has whole."""
        model, device = self._strategy._stateful_module, self._strategy.root_device
        parameters = [parameter for parameter in self.main_params(optimizer) if parameter.grad is not None]
        whole = {id(parameter): cast("torch.Tensor", parameter.grad) for parameter in parameters}
        # By process group, for units may differ in it; every rank meets the groups in the order of the units.
        shards: dict[dist.ProcessGroup | None, list[torch.Tensor]] = {}
        for unit in FullyShardedDataParallel.fsdp_modules(model):
            if unit.sharding_strategy != ShardingStrategy.NO_SHARD:
                of_group = shards.setdefault(unit.process_group, [])
                of_group.extend(whole.pop(id(part)) for part in parameters_of(unit) if id(part) in whole)
        total = _squared_norm(whole.values(), device)
        for group, gradients in shards.items():
            squared = _squared_norm(gradients, device)
            dist.all_reduce(squared, group=group)
            total += squared
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_val, total.sqrt())


def _as_sharding_strategy(value: ShardingStrategy | str) -> ShardingStrategy:
    if isinstance(value, ShardingStrategy):
        return value
    known = {member.name: member for member in ShardingStrategy}
    if value.upper() not in known:
        raise ValueError(f"sharding_strategy must be one of {listing(known)}, found {value!r}.")
    return known[value.upper()]


def _squared_norm(gradients: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32).to(device) for gradient in gradients]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)
