"""Where bytes live: readers and writers, and which of them an id belongs to."""

from __future__ import annotations

from dcp_plugins.contract import StorageReader, StorageWriter, WriteResult
from dcp_plugins.storage.hf_quantized import QuantizedHuggingFaceStorageReader
from dcp_plugins.storage.hf_reader import HuggingFaceStorageReader
from dcp_plugins.storage.hf_writer import HuggingFaceStorageWriter
from dcp_plugins.storage.reader import FileSystemReader
from dcp_plugins.storage.registry import find_reader, find_writer, register_storage
from dcp_plugins.storage.transforms import ExtensionRegistry, ZStandard
from dcp_plugins.storage.writer import FileSystemWriter

__all__ = [
    "ExtensionRegistry",
    "FileSystemReader",
    "FileSystemWriter",
    "HuggingFaceStorageReader",
    "HuggingFaceStorageWriter",
    "QuantizedHuggingFaceStorageReader",
    "StorageReader",
    "StorageWriter",
    "WriteResult",
    "ZStandard",
    "find_reader",
    "find_writer",
    "register_storage",
]
