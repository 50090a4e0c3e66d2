"""Builders of the standard library's values: each makes an object from the fields that its class pickles.

A builder accepts the fields that the class itself writes, for pickle protocols 2 to 5 and Python 3.10 and later, and
raises ``DecodingError`` for others. The class's own ``__setstate__`` and ``__reduce__`` never see a field of the file.
"""

from __future__ import annotations

import argparse
import array
import collections
import datetime
import decimal
import fractions
import functools
import io
import pathlib
import random
import re
import types
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any

from dcp_plugins.format import value_numpy, value_tensors
from dcp_plugins.format.value_decoder import Builders, Decoder, Function
from dcp_plugins.format.value_errors import DecodingError, RefusedError

__all__ = ["PLAIN_FACTORIES", "builders"]

_POINTER_BYTES = 16
_GENERATOR_BYTES = 4096
# Dividing and comparing larger integers takes seconds.
_MAX_FRACTION_BITS = 1 << 16

PLAIN_FACTORIES = frozenset(
    {list, dict, set, tuple, frozenset, int, float, str, bool, bytes, collections.Counter, collections.OrderedDict}
    | {collections.deque}
)
"""The factories that a ``defaultdict`` may have."""

_ENCODE = Function("_codecs.encode")
_GETATTR = Function("builtins.getattr")
_COMPILE = Function("re._compile")
_ZONE = Function("zoneinfo.ZoneInfo._unpickle")
_ARRAY = Function("array._array_reconstructor")
_REGEX_FLAGS = re.ASCII | re.IGNORECASE | re.LOCALE | re.MULTILINE | re.DOTALL | re.VERBOSE | re.UNICODE


def expect(args: tuple[Any, ...], *kinds: type, what: str) -> None:
    """Check that the first arguments have exactly these types.

    Raises:
        DecodingError: They have not, or there are fewer.
    """
    if len(args) < len(kinds) or not all(type(arg) is kind for arg, kind in zip(args, kinds, strict=False)):
        raise DecodingError(f"a {what} of {', '.join(type(arg).__name__ for arg in args) or 'nothing'}")


def _encode(decoder: Decoder, args: tuple[Any, ...]) -> bytes:
    expect(args, str, str, what="bytes")
    if args[1] not in ("latin1", "latin-1"):
        raise DecodingError(f"bytes in encoding {args[1][:50]!r}")
    decoder.limits.charge(len(args[0]))
    return str(args[0]).encode("latin-1")


def _bytes(decoder: Decoder, args: tuple[Any, ...]) -> bytes:
    if args:
        raise DecodingError("bytes with arguments")
    return b""


def _bytearray(decoder: Decoder, args: tuple[Any, ...]) -> bytearray:
    if len(args) == 2:
        return bytearray(_encode(decoder, args))
    if args:
        expect(args, bytes, what="bytearray")
        decoder.limits.charge(len(args[0]))
    return bytearray(*args)


def _members(decoder: Decoder, args: tuple[Any, ...]) -> list[Any]:
    if not args:
        return []
    expect(args, list, what="set")
    decoder.limits.charge(_POINTER_BYTES * len(args[0]))
    for member in args[0]:
        decoder.limits.check_key(args[0], member)
    return list(args[0])


def _complex(decoder: Decoder, args: tuple[Any, ...]) -> complex:
    expect(args, float, float, what="complex")
    return complex(*args)


def _range(decoder: Decoder, args: tuple[Any, ...]) -> range:
    expect(args, int, int, int, what="range")
    return range(*args)


def _slice(decoder: Decoder, args: tuple[Any, ...]) -> slice:
    if len(args) != 3 or any(isinstance(arg, slice) for arg in args):
        # The interpreter frees nested slices by recursion: deep ones overflow its stack.
        raise DecodingError("a slice of slices")
    return slice(*args)


def _ordered_dict(decoder: Decoder, args: tuple[Any, ...]) -> collections.OrderedDict[Any, Any]:
    made: collections.OrderedDict[Any, Any] = collections.OrderedDict()
    if args:
        # Python 2 wrote the value in this form.
        expect(args, list, what="OrderedDict")
        decoder.limits.charge(_POINTER_BYTES * len(args[0]))
        for pair in args[0]:
            decoder.set_items(made, list(pair))
    return made


def _default_dict(decoder: Decoder, args: tuple[Any, ...]) -> collections.defaultdict[Any, Any]:
    factory = args[0] if args else None
    is_plain = factory is None or (isinstance(factory, type) and factory in PLAIN_FACTORIES)
    if not is_plain and not decoder.trust.holds(factory):
        raise RefusedError(getattr(factory, "__qualname__", type(factory).__name__), "is a defaultdict's factory")
    return collections.defaultdict(factory)


def _counter(decoder: Decoder, args: tuple[Any, ...]) -> collections.Counter[Any]:
    if args:
        expect(args, dict, what="Counter")
        decoder.limits.charge(_POINTER_BYTES * len(args[0]))
    made: collections.Counter[Any] = collections.Counter()
    dict.update(made, *args)
    return made


def _deque(decoder: Decoder, args: tuple[Any, ...]) -> collections.deque[Any]:
    items = args[0] if args else ()
    if type(items) not in (tuple, list):
        raise DecodingError(f"a deque of {type(items).__name__}")
    maxlen = args[1] if len(args) > 1 else None
    if maxlen is not None and type(maxlen) is not int:
        raise DecodingError(f"a deque with a maxlen of {type(maxlen).__name__}")
    # An empty deque allocates a block of memory: count it.
    decoder.limits.charge(512 + _POINTER_BYTES * len(items))
    return collections.deque(items, maxlen)


def _decimal(decoder: Decoder, args: tuple[Any, ...]) -> decimal.Decimal:
    expect(args, str, what="Decimal")
    decoder.limits.charge(len(args[0]))
    return decimal.Decimal(args[0])


def _fraction(decoder: Decoder, args: tuple[Any, ...]) -> fractions.Fraction:
    if len(args) == 1:
        expect(args, str, what="Fraction")
        args = tuple(int(part) for part in args[0].split("/", 1))
    expect(args, *[int] * len(args), what="Fraction")
    if any(part.bit_length() > _MAX_FRACTION_BITS for part in args):
        raise DecodingError(f"a Fraction with a part of more than {_MAX_FRACTION_BITS} bits")
    return fractions.Fraction(*args)


def _uuid_state(decoder: Decoder, target: uuid.UUID, state: Any) -> None:
    number, safety = state.get("int"), state.get("is_safe")
    if type(number) is not int or not 0 <= number < 1 << 128 or safety not in (None, 0, -1):
        raise DecodingError("a UUID that is no number of 128 bits")
    object.__setattr__(target, "int", number)
    object.__setattr__(target, "is_safe", uuid.SafeUUID(safety))


def _path_builder(kind: type[pathlib.PurePath]) -> Callable[[Decoder, tuple[Any, ...]], pathlib.PurePath]:
    def build(decoder: Decoder, args: tuple[Any, ...]) -> pathlib.PurePath:
        expect(args, *[str] * len(args), what="path")
        return kind(*args)

    return build


def _timezone_of(decoder: Decoder, value: Any) -> Any:
    if value is None or type(value) in (datetime.timezone, zoneinfo.ZoneInfo) or decoder.trust.holds(type(value)):
        return value
    raise DecodingError(f"a time zone that is a {type(value).__name__}")


def _datetime(decoder: Decoder, args: tuple[Any, ...]) -> datetime.datetime:
    expect(args, bytes, what="datetime")
    high, low, month, day, hour, minute, second, *micro = args[0]
    zone = _timezone_of(decoder, args[1]) if len(args) > 1 else None
    micros = int.from_bytes(bytes(micro), "big")
    # The highest bit of the month's byte is the fold.
    return datetime.datetime(
        high << 8 | low, month & 127, day, hour, minute, second, micros, tzinfo=zone, fold=month >> 7
    )


def _date(decoder: Decoder, args: tuple[Any, ...]) -> datetime.date:
    expect(args, bytes, what="date")
    high, low, month, day = args[0]
    return datetime.date(high << 8 | low, month, day)


def _time(decoder: Decoder, args: tuple[Any, ...]) -> datetime.time:
    expect(args, bytes, what="time")
    hour, minute, second, *micro = args[0]
    zone = _timezone_of(decoder, args[1]) if len(args) > 1 else None
    return datetime.time(hour & 127, minute, second, int.from_bytes(bytes(micro), "big"), tzinfo=zone, fold=hour >> 7)


def _timedelta(decoder: Decoder, args: tuple[Any, ...]) -> datetime.timedelta:
    expect(args, int, int, int, what="timedelta")
    return datetime.timedelta(*args)


def _timezone(decoder: Decoder, args: tuple[Any, ...]) -> datetime.timezone:
    expect(args, datetime.timedelta, *[str] * (len(args) - 1), what="timezone")
    return datetime.timezone(*args)


def _zone(decoder: Decoder, args: tuple[Any, ...]) -> zoneinfo.ZoneInfo:
    expect(args, str, what="ZoneInfo")
    # ZoneInfo itself refuses a key that leaves its directories.
    return zoneinfo.ZoneInfo(args[0])


def _getattr(decoder: Decoder, args: tuple[Any, ...]) -> Any:
    """Return a class in a trusted class, or a member of a trusted enum: old protocols pickle them as ``getattr``."""
    if len(args) != 2 or type(args[1]) is not str:
        raise DecodingError("getattr of something else than an object and a name")
    owner, name = args
    if owner is zoneinfo.ZoneInfo and name == "_unpickle":
        return _ZONE
    if isinstance(owner, type) and decoder.trust.holds(owner):
        members = getattr(owner, "__members__", {})
        if name in members:
            return members[name]
        return decoder.trust.find(owner.__module__, f"{owner.__qualname__}.{name}")
    raise RefusedError(f"{getattr(owner, '__qualname__', type(owner).__name__)}.{name}")


def _compile(decoder: Decoder, args: tuple[Any, ...]) -> re.Pattern[Any]:
    pattern, flags = args
    if type(pattern) not in (str, bytes) or type(flags) is not int or flags & ~int(_REGEX_FLAGS):
        raise DecodingError("a regular expression with unknown flags")
    return re.compile(pattern, flags)


def _array(decoder: Decoder, args: tuple[Any, ...]) -> array.array[Any]:
    expect(args, str, list, what="array")
    decoder.limits.charge(8 * len(args[1]))
    return array.array(args[0], args[1])


def _array_of_bytes(decoder: Decoder, args: tuple[Any, ...]) -> array.array[Any]:
    kind, code, _machine_format, raw = args
    made: array.array[Any] = array.array(code)
    # On other machines arrays may have another item size or byte order.
    if kind is not array.array or type(raw) is not bytes or made.itemsize not in (1, 2, 4, 8):
        raise DecodingError("an array that is no bytes")
    decoder.limits.charge(len(raw))
    made.frombytes(raw)
    return made


def _random(decoder: Decoder, args: tuple[Any, ...]) -> random.Random:
    if args:
        raise DecodingError("a Random with arguments")
    decoder.limits.charge(_GENERATOR_BYTES)
    return random.Random(0)  # noqa: S311 - the state that follows is the file's


def _random_state(decoder: Decoder, target: random.Random, state: Any) -> None:
    version, internal, gauss = state
    is_state = type(internal) is tuple and all(type(number) is int for number in internal)
    if version != 3 or not is_state or type(gauss) not in (float, type(None)):
        raise DecodingError("a state that is not Random's")
    target.setstate((version, internal, gauss))


def _bytes_io_state(decoder: Decoder, target: io.BytesIO, state: Any) -> None:
    content, position, attributes = state
    if type(content) is not bytes or type(position) is not int or attributes:
        raise DecodingError("a BytesIO without bytes")
    decoder.limits.charge(len(content))
    target.write(content)
    target.seek(position)


def _attributes(decoder: Decoder, target: Any, state: Any) -> None:
    if type(state) is not dict or not all(type(name) is str for name in state):
        raise DecodingError(f"attributes of a {type(target).__name__} that have no names")
    decoder.limits.charge(_POINTER_BYTES * len(state))
    target.__dict__.update(state)


def _chain_map_state(decoder: Decoder, target: collections.ChainMap[Any, Any], state: Any) -> None:
    maps = state["maps"]
    if type(maps) is not list or not all(isinstance(part, (dict, collections.ChainMap)) for part in maps):
        raise DecodingError("a ChainMap of something else than dicts")
    target.maps = maps


def _empty(kind: Any) -> Callable[[Decoder, tuple[Any, ...]], Any]:
    """Return the builder of an empty instance, which gets its state later (opcode BUILD)."""

    def build(decoder: Decoder, args: tuple[Any, ...]) -> Any:
        if args:
            raise DecodingError(f"a {kind.__name__} with arguments")
        return kind.__new__(kind)

    return build


def _namespace(decoder: Decoder, args: tuple[Any, ...]) -> types.SimpleNamespace:
    if args:
        raise DecodingError("a SimpleNamespace with arguments")
    return types.SimpleNamespace()


_CLASSES: dict[type, Callable[[Decoder, tuple[Any, ...]], Any]] = {
    bytes: _bytes,
    bytearray: _bytearray,
    set: lambda decoder, args: set(_members(decoder, args)),
    frozenset: lambda decoder, args: frozenset(_members(decoder, args)),
    complex: _complex,
    range: _range,
    slice: _slice,
    collections.OrderedDict: _ordered_dict,
    collections.defaultdict: _default_dict,
    collections.Counter: _counter,
    collections.deque: _deque,
    decimal.Decimal: _decimal,
    fractions.Fraction: _fraction,
    datetime.datetime: _datetime,
    datetime.date: _date,
    datetime.time: _time,
    datetime.timedelta: _timedelta,
    datetime.timezone: _timezone,
    types.SimpleNamespace: _namespace,
    array.array: _array,
    random.Random: _random,
}
_FILLED = (uuid.UUID, collections.ChainMap, argparse.Namespace, io.BytesIO)


@functools.cache
def builders() -> Builders:
    """Return every builder: the standard library's, NumPy's and torch's."""
    names: dict[tuple[str, str], Any] = {
        ("_codecs", "encode"): _ENCODE,
        ("builtins", "getattr"): _GETATTR,
        ("builtins", "Ellipsis"): Ellipsis,
        ("builtins", "NotImplemented"): NotImplemented,
        ("re", "_compile"): _COMPILE,
        ("array", "_array_reconstructor"): _ARRAY,
        ("zoneinfo", "ZoneInfo"): zoneinfo.ZoneInfo,
        ("zoneinfo._common", "ZoneInfo"): zoneinfo.ZoneInfo,
        ("io", "BytesIO"): io.BytesIO,
    }
    reducers: dict[Any, Any] = {
        **_CLASSES,
        _ENCODE: _encode,
        _GETATTR: _getattr,
        _COMPILE: _compile,
        _ARRAY: _array_of_bytes,
        _ZONE: _zone,
    }
    for kind in (*PLAIN_FACTORIES, *_CLASSES, *_FILLED):
        names[kind.__module__, kind.__name__] = kind
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        kind = _path_class(name)
        # Pickles of Python 3.13 name the module that defines the classes.
        for module in ("pathlib", "pathlib._local"):
            names[module, name] = kind
        reducers[kind] = _path_builder(kind)
    setters: dict[type, Any] = {
        uuid.UUID: _uuid_state,
        collections.ChainMap: _chain_map_state,
        argparse.Namespace: _attributes,
        types.SimpleNamespace: _attributes,
        collections.OrderedDict: _attributes,
        io.BytesIO: _bytes_io_state,
        random.Random: _random_state,
    }
    makers: dict[type, Any] = {kind: _empty(kind) for kind in _FILLED}
    for part in (value_numpy.builders(), value_tensors.builders()):
        names.update(part.names)
        reducers.update(part.reducers)
        makers.update(part.makers)
        setters.update(part.setters)
    return Builders(names, reducers, makers, setters)


def _path_class(name: str) -> type[pathlib.PurePath]:
    """Return the class of a path, or its pure variant if this operating system cannot make it."""
    kind: type[pathlib.PurePath] = getattr(pathlib, name)
    is_concrete = issubclass(kind, pathlib.Path)
    return kind if not is_concrete or isinstance(pathlib.Path(), kind) else getattr(pathlib, f"Pure{name}")
