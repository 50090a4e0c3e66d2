"""The flag ``dcp_fsdp``: Lightning's ``FSDPStrategy`` (FSDP1), with checkpoints that every rank writes and reads.

The whole LightningModule is wrapped in one ``FullyShardedDataParallel``, as stock does, so that parameters of its own,
and methods of its children other than ``forward``, work in ``training_step``. What differs from stock besides the
checkpoints: the blocks that repeat are units by default, ranks start from rank 0's values, the CPU is a device,
gradients can be clipped by norm, manual optimization works, and a module that has been fitted can be validated or
fitted again, by any trainer with this flag.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.optim import Optimizer

from dcp_plugins.lightning.every_rank import CheckpointsOnEveryRank
from dcp_plugins.lightning.fsdp1_units import (
    OnAnyDevice,
    WrapsWithFSDP1,
    as_policy,
    as_sharding_strategy,
    refuse_full_state_dicts,
)
from dcp_plugins.lightning.sharding import refuse_weight_averaging
from dcp_plugins.lightning.wrapping import parameters_of

__all__ = ["DCPFSDPStrategy"]


class DCPFSDPStrategy(CheckpointsOnEveryRank, WrapsWithFSDP1, FSDPStrategy):
    """The flag ``dcp_fsdp``: ``FSDPStrategy`` with its options, on any accelerator or the CPU.

    Modules that ``configure_model()`` has wrapped are left as they are, and nothing else is wrapped then. Checkpoints
    are always sharded directories; stock ``FSDPStrategy(state_dict_type="sharded")`` loads them, and ours loads its.

    Args:
        auto_wrap_policy: Which submodules become units of FSDP1: classes, or a policy as ``FullyShardedDataParallel``
            takes it. By default the blocks that repeat; an empty set makes the whole model one unit.
        sharding_strategy: As in ``FSDPStrategy``. Hybrid sharding needs no more than its name: it shards over the
            devices of a node and replicates over nodes, unless ``device_mesh`` says otherwise.
        state_dict_type: "sharded", the only one there is. `dcp_plugins.lightning.consolidate` makes one file with full
            tensors of a directory.
        options: All others of ``FSDPStrategy``, and of ``FullyShardedDataParallel``. ``sync_module_states`` is on
            unless it is set to False: ranks start from rank 0's values. ``asynchronous=True`` saves in the background.
    """

    _shards_model = True
    _stock_model_key = "model"
    _is_called = False

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
        self.sharding_strategy = as_sharding_strategy(sharding_strategy, self.kwargs)

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

    @property
    def _fsdp_options(self) -> dict[str, Any]:
        options: dict[str, Any] = self.kwargs
        return options

    def setup_environment(self) -> None:
        self._set_up_groups(self.precision_plugin.precision, super().setup_environment)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if not self._is_wrapped(model):
            assert self.lightning_module is not None
            refuse_weight_averaging(self.lightning_module.trainer)
        return self._wrap(model)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Let ``torch.distributed.fsdp.wrap.wrap`` in ``configure_model()`` wrap with the strategy's options."""
        with self._wrapping_by_hand():
            yield


class _DCPFSDPPrecision(OnAnyDevice, FSDPPrecision):
    """Lightning's precision for FSDP1, knowing what stock's does not: the device, and the units with the gradients."""

    _strategy: DCPFSDPStrategy

    @property
    def mixed_precision_config(self) -> MixedPrecision:
        return self._mixed_precision(lambda: super(OnAnyDevice, self).mixed_precision_config)

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


def _squared_norm(gradients: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32).to(device) for gradient in gradients]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)
