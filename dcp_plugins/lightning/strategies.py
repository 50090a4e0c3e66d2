"""The Trainer's strategies: Lightning's own, with checkpoints that every rank writes and reads.

A stock strategy calls its ``CheckpointIO`` on rank 0 with full tensors, or bypasses it for sharded ones. The mixin here
calls ours on every rank with the values as they are, and restores after the model has been set up, so that tensors are
read straight into where they stay.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from dcp_plugins.errors import CheckpointNotFoundError
from dcp_plugins.lightning.checkpoint_io import DCPCheckpointIO
from dcp_plugins.lightning.layout import is_committed, last_checkpoint
from dcp_plugins.lightning.sharding import AutoWrapPolicy, is_sharded, shard_module
from dcp_plugins.state_dict import get_model_state_dict, get_optimizer_state_dict

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["DCPDDPStrategy", "DCPFSDP2Strategy", "DCPSingleDeviceStrategy", "register_strategies"]

_PathLike = str | os.PathLike[str]
_Answer = TypeVar("_Answer")


class _CheckpointsOnEveryRank(Strategy):
    """Mixed in before a strategy of Lightning: replaces how it saves, loads, and finds its ``CheckpointIO``."""

    _single_process = False

    @property
    def checkpoint_io(self) -> DCPCheckpointIO:
        if self._checkpoint_io is None:
            self.checkpoint_io = DCPCheckpointIO()
        assert isinstance(self._checkpoint_io, DCPCheckpointIO)
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, plugin: CheckpointIO) -> None:
        if not isinstance(plugin, DCPCheckpointIO):
            raise TypeError(
                f"{type(self).__name__} needs a DCPCheckpointIO, got {type(plugin).__name__}: other plugins write on"
                " rank 0 only. Leave the plugin out, or use one of Lightning's own strategies with it."
            )
        plugin.single_process = self._single_process
        self._checkpoint_io = plugin

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False  # load_checkpoint has restored it in place

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Collect the model's state under names that do not depend on the strategy: sharded values stay sharded."""
        assert self.lightning_module is not None
        return get_model_state_dict(self.lightning_module)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Collect an optimizer's state by the parameters' names."""
        assert self.lightning_module is not None
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        return get_optimizer_state_dict(self.lightning_module, optimizer)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Do nothing: `load_checkpoint` has loaded the model in place."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Do nothing: `load_checkpoint` has loaded the optimizers in place."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PathLike, storage_options: Any | None = None
    ) -> None:
        """Save on every rank to the path that rank 0 names."""
        path, aside = self._decide_on_rank_zero(lambda: _make_room(Path(filepath)))
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)
        if aside is not None and self.is_global_zero:
            aside.unlink(missing_ok=True)

    def load_checkpoint(self, checkpoint_path: _PathLike, weights_only: bool | None = None) -> dict[str, Any]:
        """Load model and, while fitting, optimizers in place; return the rest for Lightning to restore."""
        path = self._decide_on_rank_zero(lambda: _require_checkpoint(Path(checkpoint_path)))
        module = self.lightning_module
        assert module is not None
        is_fitting = module.trainer.state.fn == TrainerFn.FITTING
        return self.checkpoint_io.load_checkpoint(
            path,
            weights_only=weights_only,
            module=module,
            optimizers=self.optimizers if is_fitting else (),
            strict=module.strict_loading,
        )

    def _decide_on_rank_zero(self, decide: Callable[[], _Answer]) -> _Answer:
        """Run ``decide`` on rank 0 and return its answer, or raise its error, on every rank."""
        outcome: tuple[bool, Any] = (True, None)
        if self.is_global_zero:
            try:
                outcome = (True, decide())
            except Exception as exc:  # whatever it is, the other ranks are waiting to hear of it
                outcome = (False, exc)
        succeeded, value = self.broadcast(outcome)
        if not succeeded:
            raise value
        answer: _Answer = value
        return answer


class DCPSingleDeviceStrategy(_CheckpointsOnEveryRank, SingleDeviceStrategy):
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
                " strategy='dcp_ddp' or 'dcp_fsdp2'."
            )
        self._chosen_devices = devices
        self._root_device = devices[0]


class DCPDDPStrategy(_CheckpointsOnEveryRank, DDPStrategy):
    """The flag ``dcp_ddp``: ``DDPStrategy`` with its options; each rank writes a share of the replicated state."""


class DCPFSDP2Strategy(_CheckpointsOnEveryRank, ModelParallelStrategy):
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
    """

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
    ) -> None:
        super().__init__(
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
                " fully_shard (FSDP2): remove the wrapping, or apply fully_shard in configure_model()."
            )
        self.model = self.precision_plugin.convert_module(self.model)
        if not is_sharded(self.model):
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
        ("dcp_fsdp2", DCPFSDP2Strategy, "FSDP2 applied to the model's blocks, sharded checkpoints by dcp_plugins"),
    ):
        StrategyRegistry.register(name, strategy, description=description, override=True)


def _make_room(path: Path) -> tuple[Path, Path | None]:
    """See to it that ``path`` can be a directory of its own. Runs on rank 0, before any rank writes.

    Returns:
        The path, and where an ordinary checkpoint file was put that had its name: to be deleted after the commit.
    """
    if path.is_symlink():
        # It leads to another checkpoint, which a save through it would overwrite.
        path.unlink()
    elif path.is_file():
        aside = path.with_name(f"{path.name}.replaced")
        path.replace(aside)
        return path, aside
    return path, None


def _require_checkpoint(path: Path) -> Path:
    """Return ``path`` if a checkpoint is there. Runs on rank 0."""
    if path.is_file() or is_committed(path):
        return path
    if path.is_dir():
        what = f"{path} is not a checkpoint: it has no .metadata, so the save into it never finished"
    else:
        what = f"there is no checkpoint at {path}"
    beside = last_checkpoint(path.parent)
    hint = f" The newest committed checkpoint beside it is {beside}." if beside is not None else ""
    raise CheckpointNotFoundError(f"Expected a committed checkpoint, but {what}.{hint}")
