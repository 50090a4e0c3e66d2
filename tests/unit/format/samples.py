"""Metadata to encode: examples, and a hypothesis strategy for everything that a save can describe."""

from __future__ import annotations

import pathlib
import string
from typing import Any

import torch
from hypothesis import strategies as st

from dcp_plugins.contract import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


def tensor_of(*shape: int, num_chunks: int = 1, dtype: torch.dtype = torch.float32) -> TensorStorageMetadata:
    """Describe a tensor cut along its first dimension into ``num_chunks`` equal chunks."""
    rows = shape[0] // num_chunks if shape else 0
    chunks = [
        ChunkStorageMetadata(
            torch.Size([rows * position, *[0] * (len(shape) - 1)] if shape else []),
            torch.Size([rows, *shape[1:]] if shape else []),
        )
        for position in range(num_chunks)
    ]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks)


def small_metadata() -> Metadata:
    """Return a description with one of everything that torch's own writer emits."""
    return Metadata(
        state_dict_metadata={
            "layers.0.weight": tensor_of(4, 3, num_chunks=2),
            "layers.0.bias": tensor_of(4, dtype=torch.bfloat16),
            "step": BytesStorageMetadata(),
            "scale": tensor_of(),
        },
        planner_data={
            "layers.0.weight": ("layers", 0, "weight"),
            "layers.0.bias": ("layers", 0, "bias"),
            "step": ("step",),
            "scale": ("scale",),
        },
        storage_data={
            MetadataIndex("layers.0.weight", [0, 0], 0): StorageInfo("__0_0.distcp", 0, 900),
            MetadataIndex("layers.0.weight", [2, 0], 1): StorageInfo("__1_0.distcp", 0, 900),
            MetadataIndex("layers.0.bias", [0], 0): StorageInfo("__0_0.distcp", 900, 850),
            MetadataIndex("step"): StorageInfo("__0_0.distcp", 2**40, 2**33, ["zstd"]),
            MetadataIndex("scale", [], 0): StorageInfo("__0_1.distcp", 0, 0),
        },
        storage_meta=StorageMeta(pathlib.Path("/checkpoints/step-10"), "a" * 32, None, ["module"]),
        version="1.0.0",
    )


names = st.text(string.ascii_lowercase + "._0é漢\0\n", max_size=8) | st.text("x", min_size=250, max_size=300)
counts = st.integers(0, 300) | st.sampled_from([2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**70])
# Sets of one: the order of more is not kept, and shows in the repr that tests compare.
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(names | st.integers(), inner, max_size=4)
        | st.lists(inner, max_size=5).map(tuple)
        | st.sets(st.integers(), max_size=1)
        | st.frozensets(names, max_size=1)
    ),
    max_leaves=12,
)
properties = st.builds(
    TensorProperties,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from([torch.strided, torch.sparse_coo, torch.sparse_csr]),
    requires_grad=st.booleans(),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last, torch.preserve_format]),
    pin_memory=st.booleans(),
)


@st.composite
def tensors(draw: Any) -> TensorStorageMetadata:
    size = draw(st.lists(st.integers(0, 9) | st.sampled_from([2**31, 2**40]), max_size=5))
    chunks = []
    for _ in range(draw(st.integers(0, 4))):
        offsets = [draw(st.integers(0, length)) for length in size]
        sizes = [draw(st.integers(0, length - offset)) for length, offset in zip(size, offsets, strict=True)]
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    return TensorStorageMetadata(draw(properties), torch.Size(size), chunks)


indexes = st.builds(
    MetadataIndex,
    fqn=names,
    offset=st.none() | st.lists(st.integers(0, 2**33), max_size=3),
    index=st.none() | st.integers(0, 300),
)
infos = st.builds(
    StorageInfo,
    relative_path=names,
    offset=counts,
    length=counts,
    transform_descriptors=st.none() | st.lists(names, max_size=2) | st.lists(names, max_size=2).map(tuple),
)
storage_metas = st.builds(
    StorageMeta,
    checkpoint_id=st.none()
    | names
    | st.sampled_from(["", "/", "/a/b", "a", "../c d"]).map(pathlib.Path)
    | st.sampled_from(["C:\\a", "b"]).map(pathlib.PureWindowsPath),
    save_id=st.none() | names,
    load_id=st.none() | names,
    modules=st.lists(names, max_size=2),
)
metadatas = st.builds(
    Metadata,
    state_dict_metadata=st.dictionaries(names, tensors() | st.builds(BytesStorageMetadata), max_size=6),
    planner_data=st.dictionaries(names, st.lists(names | st.integers(), max_size=5).map(tuple), max_size=5) | plain,
    storage_data=st.none() | st.dictionaries(indexes, infos, max_size=6) | st.dictionaries(names, plain, max_size=2),
    storage_meta=st.none() | storage_metas,
    version=st.none() | names,
)
