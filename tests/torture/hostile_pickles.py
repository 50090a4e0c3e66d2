"""Pickles that no save writes: programs, bombs, and opcodes in bad places.

Each is a function of the path of a file that code of the pickle would create.
"""

from __future__ import annotations

import collections
import decimal
import fractions
import io
import os
import pathlib
import pickle
import random
import re
import struct
import zoneinfo
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.torture.mutations import GLOBALS

__all__ = ["PICKLES"]

Payload = Callable[[str], bytes]


class Call:
    """Is pickled as a call of a function, whose result then gets a state."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced

    def __call__(self) -> None:
        """Pickle takes nothing that cannot be called for a function."""


class Storage:
    """Is pickled as a tensor's data, in a record of its own."""

    def __init__(self, key: str, location: str, numel: int) -> None:
        self.pid = ("storage", torch.FloatStorage, key, location, numel)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.pid if isinstance(value, Storage) else None


def pickled(value: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, 2).dump(value)
    return stream.getvalue()


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _programs() -> dict[str, Payload]:
    """Return pickles that call a function, in each way that a pickle can, with functions that have an effect."""
    calls: dict[tuple[str, str], Callable[[str], bytes]] = {
        ("os", "system"): lambda path: text(f"touch {path}") + b"\x85",
        ("posix", "system"): lambda path: text(f"touch {path}") + b"\x85",
        ("subprocess", "getoutput"): lambda path: text(f"touch {path}") + b"\x85",
        ("builtins", "eval"): lambda path: text(f"open({path!r}, 'w')") + b"\x85",
        ("builtins", "exec"): lambda path: text(f"open({path!r}, 'w')") + b"\x85",
        ("builtins", "open"): lambda path: text(path) + text("w") + b"\x86",
        ("io", "open"): lambda path: text(path) + text("w") + b"\x86",
        ("_io", "FileIO"): lambda path: text(path) + text("w") + b"\x86",
        ("pathlib", "Path.touch"): lambda path: named("pathlib", "PosixPath") + text(path) + b"\x85R\x85",
        ("os", "mkdir"): lambda path: text(path) + b"\x85",
        ("shutil", "copy"): lambda path: text("/etc/hostname") + text(path) + b"\x86",
        ("numpy", "save"): lambda path: text(path) + b"K\x01\x86",
        ("numpy", "fromfile"): lambda path: text("/dev/zero") + b"\x85",
        ("torch", "save"): lambda path: b"K\x01" + text(path) + b"\x86",
        ("torch.serialization", "load"): lambda path: text("/dev/zero") + b"\x85",
        ("torch.storage", "_load_from_bytes"): lambda path: b"C\x01x\x85",
        ("logging", "FileHandler"): lambda path: text(path) + b"\x85",
        ("tempfile", "mkdtemp"): lambda path: b"NN" + text(path) + b"\x87",
        ("_pickle", "loads"): lambda path: b"C\x02N.\x85",
        ("runpy", "run_path"): lambda path: text("/dev/zero") + b"\x85",
        ("webbrowser", "open"): lambda path: text("file:///x") + b"\x85",
        ("builtins", "__import__"): lambda path: text("antigravity") + b"\x85",
    }
    made: dict[str, Payload] = {}
    for (module, name), arguments in calls.items():
        title = f"{module}.{name}"
        called = named(module, name)
        made[f"REDUCE {title}"] = lambda path, c=called, a=arguments: b"\x80\x02" + c + a(path) + b"R."
        made[f"NEWOBJ {title}"] = lambda path, c=called, a=arguments: b"\x80\x02" + c + a(path) + b"\x81."
        made[f"NEWOBJ_EX {title}"] = lambda path, c=called, a=arguments: b"\x80\x04" + c + a(path) + b"}\x92."
        made[f"STACK_GLOBAL {title}"] = lambda path, m=module, n=name, a=arguments: (
            b"\x80\x04" + text(m) + text(n) + b"\x93" + a(path) + b"R."
        )
        made[f"OBJ {title}"] = lambda path, c=called, p=None: b"\x80\x02(" + c + text(f"touch {path}") + b"o."
        made[f"INST {title}"] = lambda path, m=module, n=name: b"(" + text(f"touch {path}") + f"i{m}\n{n}\n.".encode()
    return made


def _through_admitted() -> dict[str, Payload]:
    """Return pickles that reach for more than they may by way of what every reader admits."""
    values: dict[str, Any] = {
        "program of pickle": lambda path: Call(os.system, f"touch {path}"),
        "getattr chain": Call(getattr, Call(getattr, collections.OrderedDict, "__reduce_ex__"), "__globals__"),
        "defaultdict whose factory runs": Call(collections.defaultdict, os.getcwd),
        "tensor with hooks": Call(torch._utils._rebuild_parameter, None, True, os.system),
        "codec that runs": b"\x80\x02" + named("_codecs", "encode") + text("x") + text("idna") + b"\x86R.",
        "zone out of its folder": Call(Call(getattr, zoneinfo.ZoneInfo, "_unpickle"), "../../../etc/passwd", True),
        "regular expression that never ends": Call(re._compile, "(a*)*" * 40 + "b", 32),
        "wide regular expression": Call(re._compile, "(?:" * 90 + "a" + "{1000})" * 90, 32),
        "path that is written": lambda path: Call(pathlib.PosixPath, path, state={}),
        "set of a range without end": Call(set, range(2**62)),
        "list of a range without end": Call(list, range(2**62)),
        "bytearray of a number": Call(bytearray, 2**40),
        "bytes of a number": Call(bytes, 2**40),
        "array of a number": Call(array, "d", 2**40),
        "power by a fraction": Call(fractions.Fraction, "1e999999999"),
        "decimal with a large exponent": Call(decimal.Decimal, "1e999999999999999999"),
        "random state of another length": Call(random.Random, state=(3, (1, 1, 1), None)),
        "stream far behind its end": Call(io.BytesIO, state=(b"x", 2**40, None)),
    }
    made = {name: _payload(value) for name, value in values.items()}
    for module, attribute in GLOBALS:
        name, known = f"{module}.{attribute}", named(module, attribute)
        made[f"{name} built"] = lambda path, k=known: b"\x80\x02" + k + b"}" + text("__class__") + b"K\x01sb."
        made[f"{name} called with itself"] = lambda path, k=known: b"\x80\x02" + k + k + b"\x85R."
        made[f"{name} called with a tuple that holds it"] = lambda path, k=known: (
            b"\x80\x02" + k + b"q\x00(h\x00K\x01" + text("x") + b"NNtR."
        )
        made[f"{name} made with nothing"] = lambda path, k=known: b"\x80\x02" + k + b")\x81}b."
        made[f"{name} as its own key"] = lambda path, k=known: b"\x80\x02}" + k + b"q\x00h\x00s."
    return made


_NESTED = 300_000


def _shared(depth: int, key: bool) -> bytes:
    body = b")" + b"q\x01h\x01\x86" * depth
    return b"\x80\x02}" + body + b"Ns." if key else b"\x80\x02" + body + b"."


def _bombs() -> dict[str, Payload]:
    """Return pickles that cost far more than they have bytes."""
    bodies: dict[str, bytes] = {
        "shared tuples": _shared(60, key=False),
        "shared lists": b"\x80\x02]" + b"q\x01]h\x01ah\x01a0h\x01" * 60 + b".",
        "deep tuple": b"\x80\x02)" + b"\x85" * _NESTED + b".",
        "deep list": b"\x80\x02" + b"]" * _NESTED + b"a" * (_NESTED - 1) + b".",
        "deep dict": b"\x80\x02" + b"}N" * _NESTED + b"N" + b"s" * _NESTED + b".",
        "deep frozensets": b"\x80\x04" + b"(" * _NESTED + b"N" + b"\x91" * _NESTED + b".",
        "deep marks": b"\x80\x02" + b"(" * _NESTED + b"t" * _NESTED + b".",
        "marks without end": b"\x80\x02" + b"(" * _NESTED + b".",
        "deep slices": b"\x80\x02" + named("builtins", "slice") + b"q\x00N" + b"q\x01h\x00h\x01NN\x87R" * 30_000 + b".",
        "deep deques": b"\x80\x02"
        + named("collections", "deque")
        + b"q\x00)R"
        + b"q\x01h\x00h\x01\x85\x85R" * 30_000
        + b".",
        "deep chain maps": b"\x80\x02"
        + named("collections", "ChainMap")
        + b"q\x00)\x81"
        + (b"q\x01h\x00)\x81}" + text("maps") + b"]h\x01asb") * 20_000
        + b".",
        "memo far away": b"\x80\x02Nr" + struct.pack("<I", 0x7FFFFFFF) + b".",
        "memo bomb": b"\x80\x02" + b"".join(b"Nr" + struct.pack("<I", 1 << bit) + b"0" for bit in range(31)) + b"N.",
        "memo of nothing": b"\x80\x02hq.",
        "doubled text": b"\x80\x02"
        + text("a" * 1000)
        + b"q\x00"
        + named("_codecs", "encode")
        + b"q\x010]("
        + (b"h\x01h\x00" + text("latin1") + b"\x86R") * 3000
        + b"e.",
        "number of many digits": b"\x80\x02\x8b" + struct.pack("<i", 2_000_000) + b"\x7f" * 2_000_000 + b".",
        "number of many digits as text": b"I" + b"9" * 2_000_000 + b"\n.",
        "number of negative length": b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
        "text longer than the file": b"\x80\x02X" + struct.pack("<I", 0xFFFFFFFF) + b"a.",
        "long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"a.",
        "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"a.",
        "long bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**34) + b"a.",
        "long frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
        "frame that ends in an opcode": b"\x80\x04\x95" + struct.pack("<Q", 3) + b"X\x05\x00\x00\x00hello.",
        "out-of-band buffer": b"\x80\x05\x97\x98.",
        "no opcode": b"",
        "STOP alone": b".",
        "protocol 255": b"\x80\xffN.",
        "protocol twice": b"\x80\x02\x80\x05N.",
        "nothing on the stack": b"\x80\x020.",
        "no mark": b"\x80\x02Nt.",
        "two values": b"\x80\x02NN.",
        "bytes after STOP": b"\x80\x02N." + b"x" * 100,
        "another pickle after STOP": b"\x80\x02N.\x80\x02N.",
        "global without a name": b"\x80\x02cos",
        "global with dots": b"\x80\x04" + text("os") + text("path.os.system") + b"\x93.",
        "global of a number": b"\x80\x04K\x01K\x02\x93.",
        "global of surrogates": b"\x80\x02c\xed\xa0\x80\nx\n.",
        "text of surrogates": b"\x80\x02" + text("\udc80\ud800") + b".",
        "text that is no UTF-8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
        "EXT1": b"\x80\x02\x82\x01.",
        "EXT2": b"\x80\x02\x83\x01\x00.",
        "EXT4": b"\x80\x02\x84\xff\xff\xff\x7f.",
        "PERSID": b"Pstorage\n.",
        "BINPERSID of text": b"\x80\x02" + text("storage") + b"Q.",
        "BINPERSID of itself": b"\x80\x02(" + text("storage") + b"NNNNtq\x00QQ.",
        "dict that holds itself": b"\x80\x02}q\x00h\x00h\x00s.",
        "tuple that holds itself": b"\x80\x02]q\x00h\x00a\x85.",
        "list as a key": b"\x80\x02}]Ns.",
        "append to a number": b"\x80\x02K\x01Na.",
        "set a number's item": b"\x80\x02K\x01NNs.",
        "build a number": b"\x80\x02K\x01}b.",
        "reduce a number": b"\x80\x02K\x01)R.",
        "reduce with a list": b"\x80\x02N]R.",
        "DUP": b"\x80\x02N2.",
        "POP below a mark": b"\x80\x02(00.",
        "protocol 0": b"(dp0\nS'a'\np1\nI1\ns.",
        "binary string": b"\x80\x02T\x05\x00\x00\x00hello.",
        "short binary string": b"\x80\x02U\x02\xff\xfe.",
    }
    return {name: _payload(body) for name, body in bodies.items()}


def _costly_keys() -> dict[str, Payload]:
    """Return pickles whose keys take very long to hash, or overflow the stack."""
    bodies: dict[str, bytes] = {
        "shared tuples as a key": _shared(60, key=True),
        "shared tuples in a frozenset": b"\x80\x04" + _shared(60, key=False)[2:-1] + b"q\x02(h\x02\x91.",
        "shared tuples in a set": b"\x80\x04\x8f(" + _shared(60, key=False)[2:-1] + b"\x90.",
        "deep tuple as a key": b"\x80\x02})" + b"\x85" * _NESTED + b"Ns.",
        "dict of keys with one hash": b"\x80\x02}("
        + b"".join(b"\x8a\x10" + (number * (2**61 - 1)).to_bytes(16, "little") + b"N" for number in range(30_000))
        + b"u.",
        "set of keys with one hash": b"\x80\x04\x8f("
        + b"".join(b"\x8a\x10" + (number * (2**61 - 1)).to_bytes(16, "little") for number in range(30_000))
        + b"\x90.",
    }
    return {name: _payload(body) for name, body in bodies.items()}


def _payload(value: Any) -> Payload:
    """Return the bytes of a value, which may be a function of the path."""
    if isinstance(value, bytes):
        return lambda path: value
    return lambda path: pickled(value(path) if callable(value) and not isinstance(value, Call) else value)


def _dtype(code: str, *state: Any) -> Call:
    return Call(np.dtype, code, False, True, state=state)


def _array(shape: tuple[int, ...], kind: Call, data: bytes = b"A" * 8) -> Call:
    return Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, shape, kind, False, data))


def _arrays() -> dict[str, Payload]:
    """Return pickles of arrays and dtypes whose descriptions point outside their memory."""
    plain = _dtype("f8", 3, "<", None, None, None, -1, -1, 0)
    objects = _dtype("O8", 3, "|", None, None, None, -1, -1, 63)
    flagged = _dtype("V8", 3, "|", None, None, None, 8, 1, 63)
    endless = _dtype("V8", 3, "|", (plain, (2**20,) * 8), None, None, 8, 1, 0)
    state = {
        "bit_generator": "MT19937",
        "has_gauss": 0,
        "gauss": 0.0,
        "state": {"key": _array((1,), plain), "pos": 2**40},
    }

    def field(offset: int) -> Call:
        return _dtype("V8", 3, "|", None, ("f",), {"f": (plain, offset)}, 8, 1, 0)

    values = {
        "array of objects in raw bytes": _array((1,), objects),
        "array larger than its data": _array((2**40,), plain),
        "array of negative length": _array((-1,), plain),
        "array whose length overflows": _array((2**32,) * 3, plain),
        "array of many dimensions": _array((1,) * 5000, plain),
        "field before its item": _array((1,), field(-8)),
        "field behind its item": _array((1,), field(2**30)),
        "dtype with flags of objects": _array((1,), flagged),
        "dtype of any size": _dtype("V2000000000", 3, "|", None, None, None, 2_000_000_000, 1, 0),
        "subarray without end": endless,
        "dtype without a state": Call(np.dtype, "f8", False, True),
        "dtype with a unit": _dtype("M8", 4, "<", None, None, None, -1, -1, 0, ({}, ("as", 2**31, 1, 1))),
        "scalar of another size": Call(np._core.multiarray.scalar, plain, b"x"),
        "buffer of another size": Call(np._core.numeric._frombuffer, b"x", plain, (9,), "C"),
        "generator far in its buffer": Call(np.random._pickle.__randomstate_ctor, "MT19937", state=state),
        "seed without end": Call(
            np.random.bit_generator.__pyx_unpickle_SeedSequence,
            np.random.bit_generator.SeedSequence,
            0,
            None,
            state=(2**800_000, 0, None, 4, (), None),
        ),
    }
    return {name: _payload(value) for name, value in values.items()}


def _tensor(
    size: tuple[int, ...], stride: tuple[int, ...], *, offset: int = 0, numel: int = 16, location: str = "cpu"
) -> Call:
    hooks: Any = collections.OrderedDict()
    return Call(torch._utils._rebuild_tensor_v2, Storage("0", location, numel), offset, size, stride, False, hooks)


def _tensors() -> dict[str, Payload]:
    """Return pickles of tensors that lie outside their storages, and of storages outside the file."""
    indices = _tensor((1, 2), (2, 1))
    layout = Call(torch.serialization._get_layout, "torch.sparse_coo")
    values = {
        "storage without a record": Storage("7", "cpu", 5),
        "storage of another file": Storage("../../x", "cpu", 5),
        "storage on a device": Storage("0", "cuda:99", 16),
        "storage on no device": Storage("0", "x" * 99, 16),
        "storage on the device of nothing": Storage("0", "meta", 2**60),
        "storage larger than its record": _tensor((16,), (1,), numel=2**40),
        "tensor behind its storage": _tensor((16,), (1,), offset=1),
        "tensor before its storage": _tensor((2,), (1,), offset=-4),
        "tensor with a large stride": _tensor((16,), (2**40,)),
        "tensor with a negative stride": _tensor((16,), (-1,)),
        "tensor larger than its storage": _tensor((2**50,), (1,)),
        "tensor of no memory": _tensor((2**50,), (0,)),
        "tensor of many dimensions": _tensor((1,) * 2000, (1,) * 2000),
        "tensor whose extent overflows": _tensor((2**33,) * 2, (2**33,) * 2),
        "tensor on the device of nothing": _tensor((2**40,), (1,), numel=2**40, location="meta"),
        "sparse tensor out of its size": Call(
            torch._utils._rebuild_sparse_tensor, layout, (indices, _tensor((2,), (1,)), (2**40,), True)
        ),
        "meta tensor": Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (2**62,), (1,), False),
        "wrapper of a class that is not admitted": Call(
            torch._utils._rebuild_wrapper_subclass, torch.Tensor, torch.float32, (1,), (1,), 0, None, None, False
        ),
        "array on a device": Call(
            torch._utils._rebuild_device_tensor_from_numpy, np.ones(1), torch.float32, "cuda:77", False
        ),
    }
    return {name: _payload(value) for name, value in values.items()}


PICKLES = {
    **_programs(),
    **_through_admitted(),
    **_bombs(),
    **_costly_keys(),
    **_arrays(),
    **_tensors(),
}
