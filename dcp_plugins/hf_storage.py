"""``torch.distributed.checkpoint.hf_storage`` under this package's name: directories of safetensors files."""

from __future__ import annotations

from dcp_plugins.storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

__all__ = ["HuggingFaceStorageReader", "HuggingFaceStorageWriter"]
