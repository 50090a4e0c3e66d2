"""A distributed-checkpoint engine for PyTorch: the API and the on-disk format of ``torch.distributed.checkpoint``.

``import dcp_plugins as dcp`` and every line of a DCP tutorial runs. What torch's package offers is here under the same
names; see ``docs/concepts.md`` for what happens in a save and a load.
"""

from __future__ import annotations

from dcp_plugins.contract import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    LoadPlan,
    LoadPlanner,
    Metadata,
    ReadItem,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
    TensorStorageMetadata,
    WriteItem,
)
from dcp_plugins.engine import (
    async_save,
    load,
    load_from_keys,
    load_sharded_optimizer_state_dict,
    load_state_dict,
    save,
    save_state_dict,
    start_async_process,
)
from dcp_plugins.errors import CheckpointException
from dcp_plugins.plan import DefaultLoadPlanner, DefaultSavePlanner
from dcp_plugins.storage import (
    FileSystemReader,
    FileSystemWriter,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    QuantizedHuggingFaceStorageReader,
    register_storage,
)

__version__ = "0.1.0"

__all__ = [
    "BytesStorageMetadata",
    "CheckpointException",
    "ChunkStorageMetadata",
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "FileSystemReader",
    "FileSystemWriter",
    "HuggingFaceStorageReader",
    "HuggingFaceStorageWriter",
    "LoadPlan",
    "LoadPlanner",
    "Metadata",
    "QuantizedHuggingFaceStorageReader",
    "ReadItem",
    "SavePlan",
    "SavePlanner",
    "StorageReader",
    "StorageWriter",
    "TensorStorageMetadata",
    "WriteItem",
    "__version__",
    "async_save",
    "load",
    "load_from_keys",
    "load_sharded_optimizer_state_dict",
    "load_state_dict",
    "register_storage",
    "save",
    "save_state_dict",
    "start_async_process",
]
