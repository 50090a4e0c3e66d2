"""Changes of bytes that parsers find worth a look: of opcodes in a pickle, of numbers at their limits, of parts."""

from __future__ import annotations

import contextlib
import itertools
import pickletools
import random
import struct
from collections.abc import Sequence

__all__ = ["GLOBALS", "mutated"]

_NUMBERS = (
    *(0, 1, 2, 8, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31),
    *(2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)
_PIECES = (
    *(b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08", b"\xff\xff\xff\xff"),
    *(b"..", b"/", b"\0", b"\\", b"NaN", b"1e999", b"-1", b"[" * 200, b'{"a":' * 50, b'"', b"null", b"9" * 20),
    *(b"\xed\xa0\x80", b"\xc5\xbf", b"archive/data/0", b"archive/data.pkl", b"DCPPmeta", b"DCPPfile", b"__metadata__"),
    b"data_offsets",
)
_TEXTS = (b"", b"storage", b"cpu", b"meta", b"cuda:0", b"0", b"latin1", b"x" * 300, b"..", b"/")
# Opcodes without arguments.
_BARE = b"(.012NQR]}abestu)\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94d lo"
_LENGTHS = ((b"\x8c", "<B"), (b"B", "<I"), (b"\x8e", "<Q"), (b"\x96", "<Q"), (b"\x95", "<Q"))
_NAMES = {
    "collections": "OrderedDict defaultdict deque Counter ChainMap",
    "torch": "Size FloatStorage float32 Tensor device",
    "torch.storage": "UntypedStorage",
    "torch._utils": "_rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter _rebuild_qtensor "
    "_rebuild_sparse_tensor _rebuild_nested_tensor _rebuild_wrapper_subclass "
    "_rebuild_meta_tensor_no_storage _rebuild_device_tensor_from_numpy",
    "torch._tensor": "_rebuild_from_type_v2",
    "torch.serialization": "_get_layout",
    "torch.nn.parameter": "Parameter",
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex TensorStorageMetadata StorageMeta "
    "ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "numpy": "dtype ndarray",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy._core.numeric": "_frombuffer",
    "numpy.random._pickle": "__bit_generator_ctor __generator_ctor __randomstate_ctor",
    "numpy.random.bit_generator": "__pyx_unpickle_SeedSequence",
    "numpy.ma.core": "_mareconstruct",
    "_codecs": "encode",
    "builtins": "getattr bytearray set frozenset range slice complex tuple list dict eval",
    "datetime": "datetime timezone timedelta",
    "array": "array _array_reconstructor",
    "decimal": "Decimal", "fractions": "Fraction", "uuid": "UUID", "zoneinfo": "ZoneInfo", "re": "_compile",
    "random": "Random", "io": "BytesIO", "types": "SimpleNamespace", "argparse": "Namespace",
    "pathlib": "PosixPath", "os": "system", "sys": "exit",
}  # fmt: skip
GLOBALS = [(module, name) for module, names in _NAMES.items() for name in names.split()]
"""Names that a reader of pickles admits, and some that none does."""


def mutated(data: bytes, others: Sequence[bytes], choose: random.Random, *, is_pickle: bool) -> bytes:
    """Return bytes changed in one to four places.

    Args:
        data: What is changed.
        others: Further samples, of which parts may be taken.
        choose: Makes every choice.
        is_pickle: Change opcodes, as often as bytes.
    """
    for _ in range(choose.choice((1, 1, 1, 2, 2, 3, 4))):
        if is_pickle and choose.random() < 0.6:
            data = _with_other_opcodes(data, others, choose)
        else:
            data = _with_other_bytes(data, others, choose)
    return data


def _with_other_bytes(data: bytes, others: Sequence[bytes], choose: random.Random) -> bytes:
    at = choose.randrange(len(data) + 1)
    end = min(len(data), at + choose.choice((0, 1, 1, 2, 4, 8, 32, 200)))
    match choose.randrange(8):
        case 0:
            new = bytes(byte ^ 1 << choose.randrange(8) for byte in data[at : at + 1])
            end = at + len(new)
        case 1:
            new = choose.randbytes(end - at)
        case 2:
            new = b""
        case 3:
            new = _packed(choose.choice(_NUMBERS), choose.choice(("<B", "<H", "<I", "<Q")))
            end = min(len(data), at + len(new))
        case 4:
            new = choose.choice(_PIECES)
        case 5:
            new = data[at:end] * choose.choice((2, 3, 50))
        case 6:
            other = choose.choice(others)
            start = choose.randrange(len(other) + 1)
            new = other[start : start + choose.choice((1, 8, 64, 1000))]
        case _:
            return data[:at]
    return data[:at] + new + data[end:]


def _packed(number: int, size: str) -> bytes:
    return struct.pack(size, number & (1 << 8 * struct.calcsize(size)) - 1)


def _with_other_opcodes(data: bytes, others: Sequence[bytes], choose: random.Random) -> bytes:
    tokens = _tokens(data)
    at = choose.randrange(len(tokens))
    match choose.randrange(7):
        case 0:
            del tokens[at]
        case 1:
            tokens.insert(at, tokens[choose.randrange(len(tokens))])
        case 2:
            other = choose.randrange(len(tokens))
            tokens[at], tokens[other] = tokens[other], tokens[at]
        case 3:
            tokens.insert(at, _opcode(choose))
        case 4:
            tokens[at] = _opcode(choose)
        case 5:
            given = _tokens(choose.choice(others))
            start = choose.randrange(len(given))
            tokens[at:at] = given[start : start + choose.randrange(1, 12)]
        case _:
            end = at + choose.randrange(1, 10)
            tokens[at:at] = tokens[at:end] * choose.choice((1, 2, 30))
    return b"".join(tokens)


def _tokens(data: bytes) -> list[bytes]:
    """Return the opcodes with their arguments; what cannot be read is one token."""
    starts = [0]
    # The function raises various errors where it cannot read.
    with contextlib.suppress(Exception):
        starts += [position for _, _, position in pickletools.genops(data) if position]
    return [data[start:stop] for start, stop in itertools.pairwise([*starts, len(data)])]


def _opcode(choose: random.Random) -> bytes:
    number = choose.choice(_NUMBERS)
    match choose.randrange(8):
        case 0 | 1:
            at = choose.randrange(len(_BARE))
            return _BARE[at : at + 1]
        case 2:
            module, name = choose.choice(GLOBALS)
            return f"c{module}\n{name}\n".encode()
        case 3:
            return b"\x8a\x09" + (number * choose.choice((1, -1))).to_bytes(9, "little", signed=True)
        case 4:
            text = choose.choice(_TEXTS)
            return b"X" + struct.pack("<I", len(text)) + text
        case 5:
            return choose.choice((b"h", b"q")) + bytes((choose.randrange(30),))
        case 6:
            return choose.choice((b"r", b"j")) + struct.pack("<I", number & 0xFFFFFFFF)
        case _:
            code, size = choose.choice(_LENGTHS)
            return code + _packed(number, size) + b"abc"
