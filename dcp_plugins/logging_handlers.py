"""``torch.distributed.checkpoint.logging_handlers`` under this package's name: what the checkpoint logger is called."""

from __future__ import annotations

__all__ = ["DCP_LOGGER_NAME"]

# The key that torch's handlers are registered under. Here it is only a name: attach handlers to the logger
# `dcp_plugins.events.LOGGER_NAME`, which is an ordinary logger and has none of its own.
DCP_LOGGER_NAME = "dcp_logger"
