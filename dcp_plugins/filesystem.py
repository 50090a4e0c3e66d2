"""``torch.distributed.checkpoint.filesystem`` under this package's name: checkpoints in local directories."""

from __future__ import annotations

from dcp_plugins.contract import FileSystemBase, SerializationFormat
from dcp_plugins.storage import FileSystemReader, FileSystemWriter
from dcp_plugins.storage.file_system import FileSystem

__all__ = ["FileSystem", "FileSystemBase", "FileSystemReader", "FileSystemWriter", "SerializationFormat"]
