"""Values of every listed kind, and how they are compared."""

from __future__ import annotations

import argparse
import array
import collections
import datetime
import decimal
import fractions
import io
import pathlib
import random
import re
import types
import uuid
import zoneinfo
from typing import Any

import numpy as np
import torch

UTC = datetime.timezone.utc


def attributed() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.note = "mine"  # type: ignore[attr-defined]
    return tensor


def parameter_with_state() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.tag = {"a": 1}  # type: ignore[attr-defined]
    return parameter


def ordered_with_attributes() -> Any:
    value: Any = collections.OrderedDict(b=1, a=2)
    value._metadata = {"version": 1}
    return value


def drawn(generator: Any) -> Any:
    generator.random(3)
    return generator


def counted_seeds() -> np.random.SeedSequence:
    seeds = np.random.SeedSequence([3, 4], spawn_key=(1,), pool_size=8)
    seeds.spawn(2)
    return seeds


STANDARD: dict[str, Any] = {
    "none": None,
    "booleans": [True, False],
    "integers": [0, -1, 255, 256, 65535, 65536, -(2**31), 2**31, 2**100, -(2**2100)],
    "floats": [0.0, -0.0, 1e300, float("inf")],
    "complex": 1 + 2j,
    "text": ["", "ü\n漢", "\udc80", "k" * 300],
    "bytes": [b"", b"\0\xff", b"x" * 70000],
    "bytearray": [bytearray(), bytearray(b"ab\xff")],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, (2, "x"), 3, 4)],
    "keys": {1: "a", "1": "b", None: 1, (1, (2,)): 2, frozenset({3}): 3, 2**70: 4, 1.5: 5, False: 6, b"b": 7},
    "sets": [set(), {1, 2}, frozenset(), frozenset({"a", (1, 2)})],
    "range": range(1, 10, 3),
    "slices": [slice(1, 2), slice(None, None, -1)],
    "singletons": [..., NotImplemented],
    "ordered": collections.OrderedDict(b=1, a=2),
    "ordered with attributes": ordered_with_attributes(),
    "default dicts": [collections.defaultdict(list, a=[1]), collections.defaultdict(None, a=1)],
    "counter": collections.Counter("aab"),
    "deques": [collections.deque([1, [2]], maxlen=4), collections.deque()],
    "chain map": collections.ChainMap({"a": 1}, {"b": 2}),
    "namespaces": [types.SimpleNamespace(a=1, b=[2]), argparse.Namespace(lr=0.1)],
    "decimals": [decimal.Decimal("1.50"), decimal.Decimal("-Infinity"), decimal.Decimal("1e-999")],
    "fraction": fractions.Fraction(-1, 3),
    "uuids": [uuid.UUID(int=1), uuid.uuid4()],
    "paths": [pathlib.Path("/a/b"), pathlib.Path(), pathlib.PurePosixPath("x"), pathlib.PureWindowsPath("C:\\a")],
    "times": [
        datetime.datetime(2024, 12, 31, 23, 59, 58, 7, tzinfo=UTC, fold=1),
        datetime.datetime(1, 1, 1),  # noqa: DTZ001 - without a zone, as most are saved
        datetime.date(2024, 1, 2),
        datetime.time(1, 2, 3, 4),
        datetime.timedelta(-1, 5, 6),
        datetime.timezone(datetime.timedelta(hours=2), "here"),
    ],
    "zone": datetime.datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
    "pattern": re.compile("a(b)*", re.IGNORECASE),
    "array": array.array("d", [1.0, 2.0]),
    "classes": [int, collections.deque, dict],
}

NUMPY: dict[str, Any] = {
    "scalars": [np.float64(1.5), np.float32(1.5), np.int64(3), np.bool_(True), np.complex64(1j), np.float16(2)],
    "long double": np.longdouble(1) / 3,
    "text scalars": [np.str_("aü"), np.bytes_(b"ab")],
    "time scalars": [np.datetime64("2024-01-01T12", "h"), np.timedelta64(3, "ms"), np.datetime64("NaT")],
    "integers": [np.arange(6, dtype=code).reshape(2, 3) for code in ("i1", "u2", "<i4", ">i4", "u8")],
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "empty": [np.zeros((0, 3)), np.array(1.5)],
    "booleans": np.array([True, False]),
    "text": [np.array(["ab", "c"]), np.array([b"ab", b"c"]), np.array(["ab"], dtype=">U2")],
    "times": [np.array(["2024-01-01", "NaT"], "M8[D]"), np.array([1, 2], "m8[25s]"), np.array([1], "m8")],
    "structured": np.zeros(2, dtype=[("a", "<i4", (2,)), ("b", "S3"), ("c", [("d", ">f8")])]),
    "aligned": np.zeros(2, dtype=np.dtype([("a", "i1"), ("b", "f8")], align=True)),
    "titled": np.zeros(1, dtype=[(("a title", "a"), "i4")]),
    "raw": np.zeros(2, dtype="V5"),
    "record": np.zeros(1, dtype=[("a", "i4")])[0],
    "objects": np.array([["a", 1], [None, collections.deque([2])]], dtype=object),
    "masked": np.ma.array([1, 2, 3], mask=[0, 1, 0], fill_value=9),
    "dtypes": [np.dtype("f4"), np.dtype(">i8"), np.dtype([("a", "i4")]), np.dtype("M8[ns]"), np.dtype(object)],
    "state": np.random.get_state(),
    "new state": np.random.get_state(legacy=False),
    "shared": [np.arange(3)] * 2,
}

GENERATORS: dict[str, Any] = {
    **{
        kind.__name__: drawn(np.random.Generator(kind(5)))
        for kind in (np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
    },
    "RandomState": drawn(np.random.RandomState(3)),
    "Random": random.Random(7),
}

TORCH: dict[str, Any] = {
    "tensors": [torch.ones(2), torch.zeros(0), torch.tensor(1.5), torch.arange(6).reshape(2, 3).t()],
    "dtypes": [torch.ones(2, dtype=dtype) for dtype in (torch.bfloat16, torch.uint16, torch.float8_e4m3fn, torch.bool)],
    "view": torch.arange(10)[2:8:3],
    "expanded": torch.ones(1).expand(4),
    "conjugated": torch.tensor([1 + 2j]).conj(),
    "trained": torch.ones(2, requires_grad=True),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "parameter with state": parameter_with_state(),
    "buffer": torch.nn.Buffer(torch.ones(2)),
    "attributes": attributed(),
    "meta": torch.empty(3, device="meta"),
    "sparse": torch.eye(3).to_sparse(),
    "sizes": [torch.Size([1, 2]), torch.Size([])],
    "descriptions": [torch.float16, torch.device("cpu"), torch.device("cuda", 1), torch.strided],
    "version": torch.__version__,
    "deque of tensors": collections.deque([torch.ones(2)]),
    "storage": torch.arange(3).untyped_storage(),
}

EVERYTHING = {
    f"{part}: {name}": value
    for part, values in (("standard", STANDARD), ("numpy", NUMPY), ("torch", TORCH))
    for name, value in values.items()
}


def same(one: Any, other: Any) -> bool:
    """Tell whether two values have the same types, all the way down, and the same content to the bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return _same_tensors(one, other)
    if isinstance(one, np.ma.MaskedArray):
        return all(same(getattr(one, name), getattr(other, name)) for name in ("data", "mask", "fill_value"))
    if isinstance(one, (np.ndarray, np.generic)):
        is_same = one.dtype == other.dtype and one.shape == other.shape and one.dtype.metadata == other.dtype.metadata
        if one.dtype.hasobject:
            return is_same and same(one.tolist(), other.tolist())
        order = "F" if isinstance(one, np.ndarray) and one.flags.fnc else "C"
        return is_same and one.tobytes(order) == other.tobytes(order)
    if isinstance(one, dict):
        is_same = list(one) == list(other) and list(map(type, one)) == list(map(type, other))
        is_same = is_same and all(same(one[key], other[key]) for key in one)
        factories = [getattr(value, "default_factory", None) for value in (one, other)]
        return is_same and factories[0] is factories[1] and _same_attributes(one, other)
    if isinstance(one, (list, tuple, collections.deque)):
        lengths = [getattr(value, "maxlen", None) for value in (one, other)]
        return len(one) == len(other) and lengths[0] == lengths[1] and all(map(same, one, other))
    if isinstance(one, (set, frozenset)):
        return one == other
    if isinstance(one, collections.ChainMap):
        return same(one.maps, other.maps)
    if isinstance(one, (types.SimpleNamespace, argparse.Namespace)):
        return same(vars(one), vars(other))
    if isinstance(one, io.BytesIO):
        return one.getvalue() == other.getvalue() and one.tell() == other.tell()
    if isinstance(one, torch.storage.TypedStorage):
        return same(one._untyped_storage.tolist(), other._untyped_storage.tolist())
    return repr(one) == repr(other) and (one == other or one != one)


def _same_attributes(one: Any, other: Any) -> bool:
    first, second = (list(getattr(value, "__dict__", {}).items()) for value in (one, other))
    return same(first, second)


def _same_tensors(one: torch.Tensor, other: torch.Tensor) -> bool:
    described = [(t.dtype, t.shape, t.layout, t.requires_grad, t.is_conj(), t.device) for t in (one, other)]
    if described[0] != described[1] or not _same_attributes(one, other):
        return False
    if one.device.type == "meta":
        return one.stride() == other.stride()
    if one.layout is not torch.strided:
        return torch.equal(one.to_dense(), other.to_dense())
    return one.stride() == other.stride() and torch.equal(one, other)
