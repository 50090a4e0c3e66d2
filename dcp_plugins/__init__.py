"""A distributed-checkpoint engine for PyTorch: the API and the on-disk format of ``torch.distributed.checkpoint``.

``import dcp_plugins as dcp`` and every line of a DCP tutorial runs. What torch's package offers is here under the same
names; see ``docs/concepts.md`` for what happens in a save and a load.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

    # From the modules themselves: mypy takes `engine.save` for the module of that name.
    from dcp_plugins.engine.async_save import async_save
    from dcp_plugins.engine.load import load, load_from_keys, load_state_dict
    from dcp_plugins.engine.optimizer import load_sharded_optimizer_state_dict
    from dcp_plugins.engine.process_runner import start_async_process
    from dcp_plugins.engine.save import save, save_state_dict
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

# Where each name is defined. It is imported when it is first asked for: `import dcp_plugins` imports no torch.
_HOMES = {
    "contract": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "LoadPlan",
        "LoadPlanner",
        "Metadata",
        "ReadItem",
        "SavePlan",
        "SavePlanner",
        "StorageReader",
        "StorageWriter",
        "TensorStorageMetadata",
        "WriteItem",
    ),
    "engine": (
        "async_save",
        "load",
        "load_from_keys",
        "load_sharded_optimizer_state_dict",
        "load_state_dict",
        "save",
        "save_state_dict",
        "start_async_process",
    ),
    "errors": ("CheckpointException",),
    "plan": (
        "DefaultLoadPlanner",
        "DefaultSavePlanner",
    ),
    "storage": (
        "FileSystemReader",
        "FileSystemWriter",
        "HuggingFaceStorageReader",
        "HuggingFaceStorageWriter",
        "QuantizedHuggingFaceStorageReader",
        "register_storage",
    ),
    "tensors": ("CheckpointableTensor",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

# Torch's package has these as attributes once it is imported, and this one a few of its own.
_SUBMODULES = frozenset(
    (
        "contract",
        "engine",
        "errors",
        "events",
        "plan",
        "tensors",
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


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME_OF:
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_SUBMODULES.union(_HOME_OF, globals()))
