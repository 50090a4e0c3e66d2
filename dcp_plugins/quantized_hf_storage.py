"""``torch.distributed.checkpoint.quantized_hf_storage`` under this package's name: quantised safetensors files."""

from __future__ import annotations

from dcp_plugins.storage import QuantizedHuggingFaceStorageReader

__all__ = ["QuantizedHuggingFaceStorageReader"]
