"""One value of every kind a state dict may hold, made the same way on every call, and a bit-for-bit comparison."""

from __future__ import annotations

import collections
import datetime
import io
import math
import random
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from dcp_plugins.torch_versions import DTYPES_NOT_COPIED_YET

# Every dtype that torch saves; the unsigned, 8-bit and 4-bit ones have no legacy storage class.
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex128,
    torch.complex64,
    torch.complex32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
]
# Stock loads copy.
DTYPES = [dtype for dtype in DTYPES if dtype not in DTYPES_NOT_COPIED_YET]


def patterned(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Return a tensor of any dtype whose bytes are random: NaNs with payloads, negative zeros and all."""
    generator = torch.Generator().manual_seed(seed + math.prod(shape) + dtype.itemsize)
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, high, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape).to(dtype)


def tensor_values() -> dict[str, Any]:
    """Return plain tensors of every dtype and memory layout, as nested as state dicts are."""
    base = patterned(torch.float32, 24, 10)
    by_dtype = {str(dtype).removeprefix("torch."): patterned(dtype, 5, 7) for dtype in DTYPES}
    scalars = {str(dtype).removeprefix("torch."): patterned(dtype) for dtype in DTYPES}
    return {
        "dtype": by_dtype,
        "scalar": scalars,
        "empty": {"vector": torch.empty(0), "rows": torch.empty(0, 3), "columns": torch.empty(4, 0, 2).half()},
        "single": torch.tensor([7]),
        "transposed": base.t(),
        "sliced": base[3:9, 2:7],
        "stepped": base[::3, ::2],
        "expanded": patterned(torch.float32, 1, 6).expand(5, 6),
        "channels_last": patterned(torch.float32, 2, 3, 4, 5).to(memory_format=torch.channels_last),
        "channels_last_3d": patterned(torch.bfloat16, 2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
        "conj": torch.view_as_complex(numbered(4, 3, 2)).conj(),
        "conj_of_transposed": torch.view_as_complex(numbered(4, 3, 2)).t().conj(),
        "neg": torch.view_as_complex(numbered(4, 3, 2)).conj().imag,
        "shared": {"whole": base, "head": base[:10], "tail": base[10:], "again": base},
        "parameter": torch.nn.Parameter(patterned(torch.float32, 3, 4)),
        "frozen": torch.nn.Parameter(patterned(torch.float32, 3, 4), requires_grad=False),
        "buffer_needs_grad": torch.ones(2, requires_grad=True),
        "large": patterned(torch.float32, 700, 401),
        "seven_dims": numbered(2, 1, 2, 1, 2, 1, 2),
        "in list": [numbered(3), {"deep": numbered(2, 2)}, [numbered(1)], 5, "text"],
        "keys": {1: numbered(2), "with.dot": numbered(3), "": numbered(1), "ключ": numbered(4)},
    }


def other_values() -> dict[str, Any]:
    """Return values that are stored as bytes; all of a kind that loads without trusting the checkpoint."""
    return {
        "int": 7,
        "big": 2**100,
        "float": math.pi,
        "inf": -math.inf,
        "complex": 1 + 2j,
        "true": True,
        "none": None,
        "text": "Zürich ☃",
        "bytes": b"\x00\xff",
        "stream": io.BytesIO(b"serialised by somebody else"),
        "list": [1, 2.5, "three", None],
        "empty list": [],
        "tuple": (1, ("a", [2])),
        "set": {1, 2, 3},
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "array": np.arange(12, dtype=np.float32).reshape(3, 4),
        "number": np.float64(0.1),
        "integer": np.int32(-5),
        "ordered": collections.OrderedDict([("z", 1), ("a", [2, 3])]),
        "nested": {"defaults": {"lr": 1e-3, "betas": (0.9, 0.999)}, "epoch": 3},
        "path": PurePosixPath("/data/set"),
        "when": datetime.datetime(2025, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc),
        "tuple of tensors": (numbered(2), torch.tensor(3.0)),
        "random": random.Random(3).getstate(),
        "numpy random": np.random.RandomState(3).get_state(),
        "torch random": torch.Generator().manual_seed(4).get_state(),
    }


def blank(value: Any) -> Any:
    """Return a target for a load: tensors of the same shape, dtype and strides but other bits, other values None."""
    if isinstance(value, torch.Tensor):
        made = torch.empty_like(value.detach().resolve_conj().resolve_neg())
        _bits(made).fill_(1)
        return made
    if isinstance(value, Mapping):
        return {key: blank(entry) for key, entry in value.items()}
    if isinstance(value, list) and any(isinstance(entry, (torch.Tensor, Mapping, list)) for entry in value):
        return [blank(entry) for entry in value]
    return None


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements' bytes in row-major order (a copy, or a view where that is what lies in memory)."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Compare bit for bit: dtype, shape and every byte of tensors; type and value of everything else."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor), f"{where}: {type(found)}"
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        assert torch.equal(_bits(found), _bits(expected)), f"{where}: bits differ"
    elif isinstance(expected, Mapping):
        assert isinstance(found, Mapping), f"{where}: {type(found)}"
        assert list(map(str, found)) == list(map(str, expected)), f"{where}: {list(found)} != {list(expected)}"
        for key in expected:
            assert_same(found[key if key in found else str(key)], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected), f"{where}: {type(found)}"
        assert len(found) == len(expected), where
        for position, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{position}]")
    elif isinstance(expected, io.BytesIO):
        assert isinstance(found, io.BytesIO), f"{where}: {type(found)}"
        assert found.getvalue() == expected.getvalue(), where
    elif isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray), f"{where}: {type(found)}"
        assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes()), (
            where
        )
    else:
        assert type(found) is type(expected), f"{where}: {type(found)} != {type(expected)}"
        assert found == expected, f"{where}: {found!r} != {expected!r}"
