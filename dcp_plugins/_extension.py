"""``torch.distributed.checkpoint._extension`` under this package's name: transforms of what goes to storage."""

from __future__ import annotations

from dcp_plugins.contract import Extension, StreamTransformExtension
from dcp_plugins.storage import ExtensionRegistry, ZStandard

__all__ = ["Extension", "ExtensionRegistry", "StreamTransformExtension", "ZStandard"]
