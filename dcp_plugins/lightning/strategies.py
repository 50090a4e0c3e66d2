"""The flags ``dcp``, ``dcp_ddp`` and ``dcp_fsdp2``, and the registration of all (`fsdp1.py` has ``dcp_fsdp``).

Each has a twin with ``_async`` in its name, which is the same strategy with ``asynchronous=True``.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.fsdp import FullyShardedDataParallel

from dcp_plugins.lightning.every_rank import CheckpointsOnEveryRank
from dcp_plugins.lightning.fsdp1 import DCPFSDPStrategy
from dcp_plugins.lightning.sharding import AutoWrapPolicy, is_sharded, refuse_weight_averaging, shard_module
from dcp_plugins.manager.options import Asynchronous

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["DCPDDPStrategy", "DCPFSDP2Strategy", "DCPSingleDeviceStrategy", "register_strategies"]


class DCPSingleDeviceStrategy(CheckpointsOnEveryRank, SingleDeviceStrategy):
    """The flag ``dcp``: one process on one device, whichever the accelerator has."""

    _single_process = True

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The one device, once the Trainer has chosen it: it hands devices to a strategy that has this attribute."""
        return getattr(self, "_chosen_devices", None)

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) > 1:
            raise ValueError(
                f"Trainer(strategy='dcp') trains on one device, got {len(devices)}: {devices}. Set devices=1, or use"
                " strategy='dcp_ddp', 'dcp_fsdp' or 'dcp_fsdp2'."
            )
        self._chosen_devices = devices
        self._root_device = devices[0]


class DCPDDPStrategy(CheckpointsOnEveryRank, DDPStrategy):
    """The flag ``dcp_ddp``: ``DDPStrategy`` with its options; each rank writes a share of the parameters."""


class DCPFSDP2Strategy(CheckpointsOnEveryRank, ModelParallelStrategy):
    """The flag ``dcp_fsdp2``: ``ModelParallelStrategy`` that shards with FSDP2 by itself.

    A model that ``configure_model()`` has parallelised is left as it is. Any other is sharded over all ranks when the
    strategy sets it up: the LightningModule's children, and in them the blocks that repeat.

    Args:
        data_parallel_size: Number of ranks that parameters are sharded over; "auto" is all that tensor parallelism
            leaves. (Stock ``ModelParallelStrategy`` gives all ranks of a node to tensor parallelism.)
        tensor_parallel_size: Number of ranks for tensor parallelism, which ``configure_model()`` applies.
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

    _shards_model = True

    def __init__(
        self,
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
        super().__init__(
            asynchronous=asynchronous,
            thread_count=thread_count,
            sync_files=sync_files,
            overlap_staging=overlap_staging,
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            process_group_backend=process_group_backend,
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

    def setup(self, trainer: Trainer) -> None:
        """Shard the model unless that has been done, then set up optimizers and precision on the result.

        Replaces the parent's, which demands that the user has overridden ``configure_model()``.
        """
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        if any(isinstance(module, FullyShardedDataParallel) for module in self.model.modules()):
            raise TypeError(
                f"{type(self).__name__} found modules wrapped with FullyShardedDataParallel (FSDP1). It shards with"
                " fully_shard (FSDP2): remove the wrapping, apply fully_shard in configure_model(), or train with"
                " strategy='dcp_fsdp'."
            )
        self.model = self.precision_plugin.convert_module(self.model)
        if not is_sharded(self.model):
            refuse_weight_averaging(trainer)
            shard_module(
                self.model,
                self.device_mesh["data_parallel"],
                policy=self._auto_wrap_policy,
                options=self._shard_options,
            )
        # Lightning's own, private helper: what happens to meta tensors must not differ from its strategies.
        _materialize_distributed_module(self.model, self.root_device)
        self.model_to_device()
        self.barrier()
        is_fitting = trainer.state.fn == TrainerFn.FITTING
        if is_fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if is_fitting:
            _optimizers_to_device(self.optimizers, self.root_device)


def register_strategies() -> None:
    """Make the flags known to Lightning's Trainer. Done when the package is imported."""
    for name, strategy, description in (
        ("dcp", DCPSingleDeviceStrategy, "One device, checkpoints by dcp_plugins"),
        ("dcp_ddp", DCPDDPStrategy, "DDP, checkpoints by dcp_plugins written by every rank"),
        ("dcp_fsdp", DCPFSDPStrategy, "FSDP1 applied to the model's blocks, sharded checkpoints by dcp_plugins"),
        ("dcp_fsdp2", DCPFSDP2Strategy, "FSDP2 applied to the model's blocks, sharded checkpoints by dcp_plugins"),
    ):
        StrategyRegistry.register(name, strategy, description=description, override=True)
        in_background = f"{description}, in the background"
        StrategyRegistry.register(
            f"{name}_async", strategy, description=in_background, override=True, asynchronous=True
        )
