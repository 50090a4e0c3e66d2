"""Zip files, safetensors files, indexes and other JSON that no save writes."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["INDEXES", "JSON_TEXTS", "SAFETENSORS", "ZIPS"]

_HARMLESS = b"\x80\x02K\x07."


@dataclass
class Record:
    """A record of a zip file, with whatever a hostile file may say of it.

    Attributes:
        name: In the directory.
        content: The bytes in the file.
        local_name: In the local header, if it is another.
        method: How the content is compressed, as both headers say it.
        local_method: ... as the local header says it, if that is another.
        size: The sizes in the directory; None for the true one.
        crc: The CRC-32; None for the true one.
        start: Where the local header is; None for the true place.
        extra: The extra field in the directory.
        flags: In both headers.
    """

    name: bytes
    content: bytes = _HARMLESS
    local_name: bytes | None = None
    method: int = 0
    local_method: int | None = None
    size: int | None = None
    crc: int | None = None
    start: int | None = None
    extra: bytes = b""
    local_extra: bytes = b""
    flags: int = 0


def zip_of(
    records: list[Record],
    *,
    num_entries: int | None = None,
    directory_size: int | None = None,
    directory_start: int | None = None,
    comment: bytes = b"",
    before_end: bytes = b"",
) -> bytes:
    """Return a zip file."""
    body, directory = b"", b""
    for record in records:
        crc = zlib.crc32(record.content) if record.crc is None else record.crc
        size = len(record.content) if record.size is None else record.size
        start = len(body) if record.start is None else record.start
        local_name = record.name if record.local_name is None else record.local_name
        method = record.method if record.local_method is None else record.local_method
        body += struct.pack(
            "<4s5H3I2H", b"PK\3\4", 20, record.flags, method, 0, 0, crc, min(size, 2**32 - 1), min(size, 2**32 - 1),
            len(local_name), len(record.local_extra),
        )  # fmt: skip
        body += local_name + record.local_extra + record.content
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 20, 20, record.flags, record.method, 0, 0, crc, min(size, 2**32 - 1),
            min(size, 2**32 - 1), len(record.name), len(record.extra), 0, 0, 0, 0, start,
        )  # fmt: skip
        directory += record.name + record.extra
    number = len(records) if num_entries is None else num_entries
    size = len(directory) if directory_size is None else directory_size
    start = len(body) if directory_start is None else directory_start
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, number & 0xFFFF, number & 0xFFFF, size, start, len(comment))
    return body + directory + before_end + end + comment


def _plain() -> list[Record]:
    return [Record(b"a/data.pkl"), Record(b"a/byteorder", b"little"), Record(b"a/version", b"3\n")]


def _with(**changes: object) -> list[Record]:
    return [Record(b"a/data.pkl", **changes), *_plain()[1:]]  # type: ignore[arg-type]


def _deflated(nbytes: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02X" + struct.pack("<I", nbytes) + b"a" * nbytes + b".")
        archive.writestr("a/byteorder", "little")
    return stream.getvalue()


def _two_directories() -> bytes:
    """Return a zip file that a reader of zip64 understands otherwise than one that does not look for it."""
    bomb = _deflated(50_000_000)
    end = bomb.rfind(b"PK\5\6")
    number, size, start = struct.unpack("<HII", bomb[end + 10 : end + 20])
    body = bomb[: start + size]
    other = zip_of(_plain())
    other_end = other.rfind(b"PK\5\6")
    other_size, other_start = struct.unpack("<II", other[other_end + 12 : other_end + 20])
    shown = other[other_start : other_start + other_size]
    zip64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, number, number, size, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(body) + other_start + len(shown), 1)
    # The offsets of the records shown count from where they are now.
    moved = b""
    position = 0
    while position < len(shown):
        name, extra, _ = struct.unpack_from("<3H", shown, position + 28)
        (at,) = struct.unpack_from("<I", shown, position + 42)
        length = 46 + name + extra
        moved += (
            shown[position : position + 42]
            + struct.pack("<I", at + len(body))
            + shown[position + 46 : position + length]
        )
        position += length
    records = other[:other_start]
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 3, 3, len(moved), len(body) + len(records), 0)
    return body + records + moved + zip64 + locator + tail


def _wide(*numbers: int) -> bytes:
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


ZIPS: dict[str, Callable[[], bytes]] = {
    "plain": lambda: zip_of(_plain()),
    "no records": lambda: zip_of([]),
    "no pickle": lambda: zip_of(_plain()[1:]),
    "two pickles": lambda: zip_of([*_plain(), Record(b"a/data.pkl", b"\x80\x02K\x08.")]),
    "pickles of two archives": lambda: zip_of([*_plain(), Record(b"b/data.pkl", b"\x80\x02K\x08.")]),
    "records on top of each other": lambda: zip_of([*_plain(), Record(b"a/data/0", b"", size=16, start=0)]),
    "one record many times": lambda: zip_of(
        [Record(b"a/data/%d" % at, b"x" * 1000 if at == 0 else b"", size=1000, start=0) for at in range(900)] + _plain()
    ),
    "record in the directory": lambda: zip_of([*_plain(), Record(b"a/data/0", b"", size=40, start=100)]),
    "record behind the end": lambda: zip_of([*_plain(), Record(b"a/data/0", b"", size=16, start=1 << 20)]),
    "record far behind the end": lambda: zip_of([*_plain(), Record(b"a/data/0", b"", size=1, start=2**32 - 2)]),
    "record of 4 GB": lambda: zip_of(_with(size=2**32 - 2)),
    "record of zip64 size": lambda: zip_of(_with(size=2**32 - 1, extra=_wide(2**60, 2**60))),
    "record of zip64 place": lambda: zip_of(_with(start=2**32 - 1, extra=_wide(2**63))),
    "zip64 field cut short": lambda: zip_of(_with(size=2**32 - 1, extra=struct.pack("<2HI", 1, 16, 5))),
    "zip64 field of no length": lambda: zip_of(_with(size=2**32 - 1, extra=struct.pack("<2H", 1, 0))),
    "zip64 field beyond": lambda: zip_of(_with(size=2**32 - 1, extra=struct.pack("<2H", 1, 0xFFFF))),
    "extra field of many parts": lambda: zip_of(_with(extra=struct.pack("<2H", 9, 0) * 10_000, size=2**32 - 1)),
    "wrong CRC": lambda: zip_of(_with(crc=1)),
    "wrong CRC of the byte order": lambda: zip_of([_plain()[0], Record(b"a/byteorder", b"little", crc=3)]),
    "compressed": lambda: zip_of(_with(method=8)),
    "compressed in the local header": lambda: zip_of(_with(local_method=8)),
    "of an unknown method": lambda: zip_of(_with(method=99)),
    "encrypted": lambda: zip_of(_with(flags=1)),
    "bomb": lambda: _deflated(50_000_000),
    "two directories": _two_directories,
    "other name in the local header": lambda: zip_of(_with(local_name=b"../../evil")),
    "name that leads out": lambda: zip_of([Record(b"../data.pkl"), *_plain()[1:]]),
    "absolute name": lambda: zip_of([Record(b"/etc/data.pkl"), *_plain()[1:]]),
    "name with NUL": lambda: zip_of([Record(b"a\0b/data.pkl"), *_plain()[1:]]),
    "name without a folder": lambda: zip_of([Record(b"data.pkl"), Record(b"byteorder", b"little")]),
    "name that is no UTF-8": lambda: zip_of([Record(b"\xff\xfe/data.pkl"), Record(b"\xff/\xff", b"x")]),
    "name of 65,535 bytes": lambda: zip_of([Record(b"a/data.pkl"), Record(b"n" * 65535, b"x")]),
    "comment": lambda: zip_of(_plain(), comment=b"PK\5\6" + b"c" * 100),
    "comment with an end in it": lambda: zip_of(_plain(), comment=zip_of([])),
    "too many entries": lambda: zip_of(_plain(), num_entries=65535),
    "no entries": lambda: zip_of(_plain(), num_entries=0),
    "directory longer than the file": lambda: zip_of(_plain(), directory_size=1 << 30),
    "directory behind the file": lambda: zip_of(_plain(), directory_start=1 << 30),
    "directory in a record": lambda: zip_of(_plain(), directory_start=10),
    "directory cut short": lambda: zip_of(_plain(), directory_size=60),
    "directory of zip64 far away": lambda: zip_of(
        _plain(), directory_start=2**32 - 1, before_end=struct.pack("<4sIQI", b"PK\6\7", 0, 2**62, 1)
    ),
    "directory of zip64 at itself": lambda: zip_of(
        _plain(),
        directory_start=2**32 - 1,
        before_end=struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2**40, 2**40, 2**63, 2**63)
        + struct.pack("<4sIQI", b"PK\6\7", 0, 300, 1),
    ),
    "byte order of nonsense": lambda: zip_of([_plain()[0], Record(b"a/byteorder", b"\xff\xfe")]),
    "byte order of 1 MB": lambda: zip_of([_plain()[0], Record(b"a/byteorder", b"big" * 400_000)]),
    "other byte order": lambda: zip_of([_plain()[0], Record(b"a/byteorder", b"big"), Record(b"a/data/0", b"x" * 7)]),
    "half": lambda: zip_of(_plain())[:100],
    "end alone": lambda: zip_of([])[-22:],
    "signature alone": lambda: b"PK\3\4",
    "local headers alone": lambda: zip_of(_plain())[:-22],
    "zip in a zip": lambda: zip_of([Record(b"a/data.pkl", zip_of(_plain())), *_plain()[1:]]),
    "local extra field of 65,535 bytes": lambda: zip_of(_with(local_extra=b"x" * 65535)),
    "5,000 entries": lambda: zip_of([*_plain(), *(Record(b"a/%d" % at, b"") for at in range(5000))]),
}


def _safetensors(header: object, data: bytes = bytes(24), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}


def _one(**changes: object) -> bytes:
    return _safetensors({"w": _tensor(**changes)})


SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "seven bytes": lambda: bytes(7),
    "length alone": lambda: struct.pack("<Q", 0),
    "length beyond the file": lambda: _safetensors({}, length=10_000),
    "length of all": lambda: _safetensors({}, length=2**64 - 1),
    "no JSON": lambda: _safetensors(b"\xff\xfe\xfd"),
    "JSON cut short": lambda: _safetensors(b'{"w":'),
    "a list": lambda: _safetensors([]),
    "a number": lambda: _safetensors(3),
    "null": lambda: _safetensors(None),
    "NaN": lambda: _safetensors(b'{"w":NaN}'),
    "NaN in a shape": lambda: _safetensors(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,24]}}'),
    "infinity in offsets": lambda: _safetensors(b'{"w":{"dtype":"F32","shape":[6],"data_offsets":[0,Infinity]}}'),
    "a name twice": lambda: _safetensors(b'{"w":{},"w":{}}'),
    "a field twice": lambda: _safetensors(
        b'{"w":{"dtype":"F32","shape":[6],"shape":[1],"data_offsets":[0,24],"data_offsets":[0,24]}}'
    ),
    "attributes twice": lambda: _safetensors(b'{"__metadata__":{"a":"b"},"__metadata__":{"a":"c"}}'),
    "deep lists": lambda: _safetensors(b"[" * 100_000),
    "deep dicts": lambda: _safetensors(b'{"a":' * 100_000),
    "a number of a million digits": lambda: _safetensors(b'{"w":' + b"9" * 1_000_000 + b"}"),
    "a shape of a million digits": lambda: _safetensors(
        b'{"w":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,24]}}'
    ),
    "a shape of a million dimensions": lambda: _one(shape=[1] * 1_000_000),
    "a shape whose product is huge": lambda: _one(shape=[2**61] * 20_000),
    "a shape that is no list": lambda: _one(shape="23"),
    "a shape with a boolean": lambda: _one(shape=[True, 6]),
    "a shape with a float": lambda: _one(shape=[6.0]),
    "a negative shape": lambda: _one(shape=[-6]),
    "a shape beyond integers": lambda: _one(shape=[2**70]),
    "a shape with zero and much": lambda: _one(shape=[0, 2**61], data_offsets=[0, 0]),
    "no shape": lambda: _safetensors({"w": {"dtype": "F32", "data_offsets": [0, 24]}}),
    "offsets the wrong way": lambda: _one(data_offsets=[24, 0]),
    "offsets beyond the file": lambda: _one(shape=[2**20], data_offsets=[0, 2**22]),
    "negative offsets": lambda: _one(data_offsets=[-24, 0]),
    "three offsets": lambda: _one(data_offsets=[0, 24, 24]),
    "a hole": lambda: _one(shape=[1], data_offsets=[8, 12]),
    "bytes behind the last": lambda: _one(shape=[1], data_offsets=[0, 4]),
    "overlap": lambda: _safetensors({"w": _tensor(), "v": _tensor(shape=[3], data_offsets=[12, 24])}),
    "the same bytes": lambda: _safetensors({"w": _tensor(), "v": _tensor()}),
    "an unknown dtype": lambda: _one(dtype="Q9"),
    "a dtype that is a list": lambda: _one(dtype=["F32"]),
    "an odd number of halves of bytes": lambda: _one(dtype="F4", shape=[3], data_offsets=[0, 1]),
    "an entry that is a text": lambda: _safetensors({"w": "F32"}),
    "attributes that are a list": lambda: _safetensors({"__metadata__": [], "w": _tensor()}),
    "attributes with numbers": lambda: _safetensors({"__metadata__": {"a": 1}, "w": _tensor()}),
    "a name that leads out": lambda: _safetensors({"../../w": _tensor()}),
    "a name with NUL": lambda: _safetensors({"a\0b": _tensor()}),
    "a name of surrogates": lambda: _safetensors(b'{"\\ud800":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}'),
    "an empty name": lambda: _safetensors({"": _tensor()}),
    "a name of a megabyte": lambda: _safetensors({"n" * 1_000_000: _tensor()}),
    "a name from right to left": lambda: _safetensors({"\u202ew\u202c": _tensor()}),
    "a byte-order mark": lambda: _safetensors(b"\xef\xbb\xbf{}", b""),
    "UTF-16": lambda: _safetensors(json.dumps({"w": _tensor()}).encode("utf-16")),
    "a pickle": lambda: b"\x80\x02K\x01.",
    **{
        f"sharding that {what}": (
            lambda text=text: _safetensors({"__metadata__": {"DCP_SHARDING_INFO": text}, "w": _tensor()})
        )
        for what, text in {
            "is no JSON": "{",
            "is a list": "[]",
            "is a number": "5",
            "names nothing": '{"v": {}}',
            "is deep": "[" * 100_000,
            "holds null": '{"w": null}',
            "has no offsets": '{"w": {"global_shape": [2, 3]}}',
            "has other dimensions": '{"w": {"saved_offsets": [0]}}',
            "has negative offsets": '{"w": {"saved_offsets": [-1, 0]}}',
            "has offsets beyond": '{"w": {"saved_offsets": [5, 0], "global_shape": [4, 3]}}',
            "has a huge global shape": '{"w": {"saved_offsets": [0, 0], "global_shape": [4611686018427387903, 3]}}',
            "has huge offsets": '{"w": {"saved_offsets": [4611686018427387903, 0]}}',
            "has offsets of a million digits": '{"w": {"saved_offsets": [' + "9" * 1_000_000 + ", 0]}}",
        }.items()
    },
    "number of files of a million digits": lambda: _safetensors(
        {"__metadata__": {"DCP_SAVE_ID": "x", "DCP_NUM_FILES": "9" * 1_000_000}, "w": _tensor()}
    ),
    "number of files in other digits": lambda: _safetensors(
        {"__metadata__": {"DCP_SAVE_ID": "x", "DCP_NUM_FILES": "٣²"}, "w": _tensor()}
    ),
}

JSON_TEXTS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "half": lambda: b'{"a": [1, 2',
    "no UTF-8": lambda: b'{"a": "\xff\xfe"}',
    "a list": lambda: b"[1, 2]",
    "a number": lambda: b"17",
    "a text": lambda: b'"text"',
    "null": lambda: b"null",
    "NaN": lambda: b'{"a": NaN, "global_step": NaN}',
    "a million digits": lambda: b'{"global_step": ' + b"9" * 1_000_000 + b"}",
    "deep lists": lambda: b"[" * 200_000,
    "deep dicts": lambda: b'{"log_history": ' * 50_000,
    "other fields": lambda: b'{"__class__": "os.system", "__dict__": {}, "global_step": 1}',
    "a pickle": lambda: b"\x80\x02K\x01.",
    "UTF-16": lambda: '{"a": 1}'.encode("utf-16"),
    "numbers for texts": lambda: b'{"log_history": 3, "best_metric": [], "stateful_callbacks": 7, "epoch": "x"}',
    "surrogates": lambda: b'{"\\ud800": "\\udfff"}',
}

INDEXES: dict[str, Callable[[], bytes]] = {
    **JSON_TEXTS,
    "no map": lambda: b"{}",
    "a map that is a list": lambda: b'{"weight_map": []}',
    "a map to numbers": lambda: b'{"weight_map": {"w": 1}}',
    "files that lead out": lambda: b'{"weight_map": {"w": "../../etc/passwd", "b": "/etc/passwd"}}',
    "files with NUL": lambda: b'{"weight_map": {"w": "a\\u0000b"}}',
    "attributes that are a list": lambda: b'{"weight_map": {}, "metadata": [1]}',
    "a save that is a list": lambda: b'{"weight_map": {}, "metadata": {"dcp_save_id": [1]}}',
    "a save that is a number": lambda: b'{"weight_map": {}, "metadata": {"dcp_save_id": 1}}',
    "a map twice": lambda: b'{"weight_map": {"w": "a"}, "weight_map": {"w": "b"}}',
}
