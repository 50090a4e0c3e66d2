"""``torch.distributed.checkpoint.stateful`` under this package's name: what ``save`` and ``load`` ask objects for."""

from __future__ import annotations

from dcp_plugins.contract import Stateful, StatefulT

__all__ = ["Stateful", "StatefulT"]
