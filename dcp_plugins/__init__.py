"""A distributed-checkpoint engine for PyTorch: the API and the on-disk format of ``torch.distributed.checkpoint``.

``import dcp_plugins as dcp`` and every line of a DCP tutorial runs. What torch's package offers is here under the same
names; see ``docs/concepts.md`` for what happens in a save and a load.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

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
from dcp_plugins.tensors import CheckpointableTensor

if TYPE_CHECKING:
    from types import ModuleType

__version__ = "0.1.0"

__all__ = [
    "BytesStorageMetadata",
    "CheckpointException",
    "CheckpointableTensor",
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

# Torch's package has these as attributes once it is imported. Here they are imported when they are first asked for:
# `state_dict` alone takes a quarter of a second.
_SUBMODULES = frozenset(
    (
        "_extension",
        "api",
        "default_planner",
        "filesystem",
        "hf_storage",
        "logger",
        "logging_handlers",
        "metadata",
        "optimizer",
        "planner",
        "planner_helpers",
        "protocol",
        "quantized_hf_storage",
        "resharding",
        "staging",
        "state_dict",
        "state_dict_loader",
        "state_dict_saver",
        "stateful",
        "storage",
        "utils",
    )
)


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_SUBMODULES.union(globals()))
