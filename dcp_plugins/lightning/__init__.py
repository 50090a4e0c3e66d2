"""PyTorch Lightning: importing this package registers the flags ``dcp``, ``dcp_ddp``, ``dcp_fsdp`` and ``dcp_fsdp2``.

    import dcp_plugins.lightning
    trainer = Trainer(strategy="dcp_fsdp2", devices=8)
    fabric = Fabric(strategy="dcp_fsdp2", devices=8)  # see `dcp_plugins.lightning.fabric`

With ``_async`` behind the name (``dcp_fsdp2_async``) checkpoints are written in the background while training goes on.

The strategies are Lightning's own with one change: every rank takes part in writing and reading checkpoints, which are
directories in Lightning's layout for sharded checkpoints (`layout.py` says what is in one). A run saved under one flag
resumes under any other and on any number of ranks.

Importing this package also lets ``load_from_checkpoint`` and the CLI's ``--ckpt_path`` take directories
(`plain_loading.py`).
"""

from __future__ import annotations

from dcp_plugins.errors import MissingExtraError

try:
    import lightning.pytorch as _lightning  # noqa: F401
except ImportError as exc:
    raise MissingExtraError(
        f"dcp_plugins.lightning needs the distribution 'lightning' (not 'pytorch_lightning'), which could not be"
        f" imported: {exc}. Install it with: pip install 'dcp_plugins[lightning]'"
    ) from exc

from dcp_plugins.lightning.checkpoint_io import DCPCheckpointIO
from dcp_plugins.lightning.fabric import register_strategies as register_fabric_strategies
from dcp_plugins.lightning.fsdp1 import DCPFSDPStrategy
from dcp_plugins.lightning.layout import last_checkpoint, remove_uncommitted
from dcp_plugins.lightning.plain_loading import patch_plain_loading
from dcp_plugins.lightning.strategies import (
    DCPDDPStrategy,
    DCPFSDP2Strategy,
    DCPSingleDeviceStrategy,
    register_strategies,
)
from dcp_plugins.lightning.tools import consolidate, load_from_checkpoint
from dcp_plugins.manager import is_committed

__all__ = [
    "DCPCheckpointIO",
    "DCPDDPStrategy",
    "DCPFSDP2Strategy",
    "DCPFSDPStrategy",
    "DCPSingleDeviceStrategy",
    "consolidate",
    "is_committed",
    "last_checkpoint",
    "load_from_checkpoint",
    "register_strategies",
    "remove_uncommitted",
]

patch_plain_loading()
register_strategies()
register_fabric_strategies()
