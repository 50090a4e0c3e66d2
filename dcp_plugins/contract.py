"""The vocabulary that torch's distributed checkpoint (DCP) and this package share.

These are torch's own classes, not look-alikes: a third-party planner, reader, writer, stager or tensor type written
for ``torch.distributed.checkpoint`` is an instance of the same abstract classes here, and what we pickle into
``.metadata`` is unpickled by stock torch under the names it knows.

This is the only module of the package that imports ``torch.distributed.checkpoint``. It takes descriptions and
interfaces from there, nothing that does work: everything with behaviour is our own code.
"""

from __future__ import annotations

import re

import torch

from dcp_plugins.torch_private import missing_names
from dcp_plugins.torch_versions import NEWEST, OLDEST, TESTED_WITH
from dcp_plugins.user_warnings import warn_user

try:
    from torch.distributed.checkpoint._extension import Extension as Extension
    from torch.distributed.checkpoint._extension import StreamTransformExtension as StreamTransformExtension
    from torch.distributed.checkpoint._hf_utils import _HFStorageInfo as HFStorageInfo
    from torch.distributed.checkpoint.api import CheckpointException as TorchCheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemBase as FileSystemBase
    from torch.distributed.checkpoint.filesystem import SerializationFormat as SerializationFormat
    from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
    from torch.distributed.checkpoint.filesystem import _StoragePrefix as StoragePrefix
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as MemoryFormatEncoding
    from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE as STATE_DICT_TYPE
    from torch.distributed.checkpoint.metadata import STORAGE_TYPES as STORAGE_TYPES
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata as BytesStorageMetadata
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata as ChunkStorageMetadata
    from torch.distributed.checkpoint.metadata import Metadata as Metadata
    from torch.distributed.checkpoint.metadata import MetadataIndex as MetadataIndex
    from torch.distributed.checkpoint.metadata import StorageMeta as StorageMeta
    from torch.distributed.checkpoint.metadata import TensorProperties as TensorProperties
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata as TensorStorageMetadata
    from torch.distributed.checkpoint.planner import BytesIOWriteData as BytesIOWriteData
    from torch.distributed.checkpoint.planner import LoadItemType as LoadItemType
    from torch.distributed.checkpoint.planner import LoadPlan as LoadPlan
    from torch.distributed.checkpoint.planner import LoadPlanner as LoadPlanner
    from torch.distributed.checkpoint.planner import ReadItem as ReadItem
    from torch.distributed.checkpoint.planner import SavePlan as SavePlan
    from torch.distributed.checkpoint.planner import SavePlanner as SavePlanner
    from torch.distributed.checkpoint.planner import TensorWriteData as TensorWriteData
    from torch.distributed.checkpoint.planner import WriteItem as WriteItem
    from torch.distributed.checkpoint.planner import WriteItemType as WriteItemType
    from torch.distributed.checkpoint.staging import AsyncStager as AsyncStager
    from torch.distributed.checkpoint.stateful import Stateful as Stateful
    from torch.distributed.checkpoint.stateful import StatefulT as StatefulT
    from torch.distributed.checkpoint.storage import StorageReader as StorageReader
    from torch.distributed.checkpoint.storage import StorageWriter as StorageWriter
    from torch.distributed.checkpoint.storage import WriteResult as WriteResult
except ImportError as exc:
    raise ImportError(
        f"torch {torch.__version__} lacks a name that every save and load of dcp_plugins needs: {exc}. {TESTED_WITH}. "
        "Checkpoints of this package are in torch's format: torch.distributed.checkpoint loads them."
    ) from exc

__all__ = [
    "STATE_DICT_TYPE",
    "STORAGE_TYPES",
    "AsyncStager",
    "BytesIOWriteData",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Extension",
    "FileSystemBase",
    "HFStorageInfo",
    "LoadItemType",
    "LoadPlan",
    "LoadPlanner",
    "MemoryFormatEncoding",
    "Metadata",
    "MetadataIndex",
    "ReadItem",
    "SavePlan",
    "SavePlanner",
    "SerializationFormat",
    "Stateful",
    "StatefulT",
    "StorageInfo",
    "StorageMeta",
    "StoragePrefix",
    "StorageReader",
    "StorageWriter",
    "StreamTransformExtension",
    "TensorProperties",
    "TensorStorageMetadata",
    "TensorWriteData",
    "TorchCheckpointException",
    "WriteItem",
    "WriteItemType",
    "WriteResult",
]


def _warn_about_release() -> None:
    """Say once what a release of torch outside of the tested ones means."""
    numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
    found = (int(numbers[1]), int(numbers[2])) if numbers else NEWEST
    missing = missing_names()
    if OLDEST <= found <= NEWEST and not missing:
        return
    tested = f"{TESTED_WITH}; this is torch {torch.__version__}."
    if missing:
        lost = "; ".join(f"{name}, so that there are no {ability}" for name, ability in missing.items())
        warn_user(f"{tested} It lacks {lost}. Everything else works.")
    else:
        warn_user(f"{tested} Every name of torch that it needs is there.")


_warn_about_release()
