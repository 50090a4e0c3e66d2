"""Builders of NumPy's values, from descriptions that are checked before NumPy sees them.

NumPy itself believes a pickle: the state of a dtype may bring flags and offsets of its own, with which a few bytes of
the file become a pointer. Here a dtype is made anew from its kind, its size and its fields, and what else its state
says is not used. The data of an array must be exactly as long as its shape and dtype ask.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import numpy as np

from dcp_plugins.format.value_decoder import Builders, Decoder, Draft, Function
from dcp_plugins.format.value_errors import DecodingError, RefusedError

__all__ = ["BIT_GENERATORS", "builders", "is_plain_dtype"]

BIT_GENERATORS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
}
_GENERATOR_BYTES = 4096
_MAX_ARRAY_NESTING = 50
_MAX_SEED_POOL = 256
# NumPy needs quadratic time for a seed of many digits: for one of this size, some ten milliseconds.
_MAX_SEED = 1 << 65536
_MAX_DIMENSIONS = 64

_DTYPE = re.compile(r"([biufcSUVMmO])(\d{1,10})")
_TIME_UNITS = frozenset({"Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as", "generic"})
_ALIGNED_STRUCT = 0x80

_RECONSTRUCT = Function("numpy._core.multiarray._reconstruct")
_SCALAR = Function("numpy._core.multiarray.scalar")
_FROM_BUFFER = Function("numpy._core.numeric._frombuffer")
_MASKED = Function("numpy.ma.core._mareconstruct")
_BIT_GENERATOR = Function("numpy.random._pickle.__bit_generator_ctor")
_GENERATOR = Function("numpy.random._pickle.__generator_ctor")
_RANDOM_STATE = Function("numpy.random._pickle.__randomstate_ctor")
_SEED_SEQUENCE = Function("numpy.random.bit_generator.__pyx_unpickle_SeedSequence")

_make_array: Any = np.zeros(1).__reduce__()[0]
_make_scalar: Any = np.float64(0).__reduce__()[0]
_make_masked: Any = np.ma.MaskedArray([0]).__reduce__()[0]


def is_plain_dtype(dtype: np.dtype[Any]) -> bool:
    """Tell whether the builder here makes arrays of this dtype; the elements of an object array need builders too."""
    if dtype.hasobject:
        return dtype.kind == "O" and dtype.names is None
    return type(dtype).__module__ == "numpy.dtypes" and dtype.kind in "biufcSUVMm" and dtype.type is not np.record


def _dtype(decoder: Decoder, args: tuple[Any, ...]) -> Draft:
    name = args[0]
    found = _DTYPE.fullmatch(name) if type(name) is str else None
    if found is None:
        raise DecodingError(f"the dtype {name!r:.80}")
    kind, size = found[1], int(found[2])
    return Draft(lambda _, state: _finished_dtype(kind, size, state))


def _finished_dtype(kind: str, size: int, state: Any) -> np.dtype[Any]:
    _version, order, subarray, names, fields, itemsize, _alignment, flags, *rest = state
    metadata = rest[0] if rest else None
    if order not in ("<", ">", "|", "=") or type(itemsize) is not int or type(flags) is not int:
        raise DecodingError("a dtype whose state is not NumPy's")
    made: np.dtype[Any]
    if kind == "O":
        made = np.dtype(object)
    elif kind in "Mm":
        metadata, (unit, count, *_) = rest[0]
        unit = unit.decode() if type(unit) is bytes else unit
        if unit not in _TIME_UNITS or type(count) is not int:
            raise DecodingError(f"the unit of time {unit!r:.80}")
        made = np.dtype(f"{order}{kind}{size}" if unit == "generic" else f"{order}{kind}{size}[{count}{unit}]")
    elif subarray is not None:
        base, shape = subarray
        shape = (shape,) if type(shape) is int else shape
        made = np.dtype((_checked_dtype(base), _checked_shape(shape)))
    elif names is not None:
        made = _structure(names, fields, size, is_aligned=bool(flags & _ALIGNED_STRUCT))
    else:
        made = np.dtype(f"{order}{kind}{size}")
    if metadata:
        made = np.dtype(made, metadata=metadata)
    if itemsize not in (-1, made.itemsize) or (kind not in "OU" and made.itemsize != size):
        raise DecodingError(f"the dtype {kind}{size} of {itemsize} bytes")
    return made


def _structure(names: Any, fields: Any, size: int, *, is_aligned: bool) -> np.dtype[Any]:
    if type(names) is not tuple or not all(type(name) is str for name in names) or type(fields) is not dict:
        raise DecodingError("a structured dtype whose fields have no names")
    described = [fields[name] for name in names]
    offsets = [field[1] for field in described]
    if not all(type(offset) is int for offset in offsets):
        raise DecodingError("a structured dtype whose fields have no offsets")
    description: dict[str, Any] = {
        "names": list(names),
        "formats": [_checked_dtype(field[0]) for field in described],
        # NumPy checks that every field lies within the item.
        "offsets": offsets,
        "itemsize": size,
    }
    if any(len(field) > 2 for field in described):
        description["titles"] = [field[2] if len(field) > 2 else None for field in described]
    make: Any = np.dtype
    made: np.dtype[Any] = make(description, align=is_aligned)
    return made


def _checked_dtype(dtype: Any) -> np.dtype[Any]:
    """Return a dtype without objects, whose items are their bytes."""
    if not isinstance(dtype, np.dtype):
        raise DecodingError(f"a dtype that is a {type(dtype).__name__}")
    if dtype.hasobject:
        raise DecodingError("objects in a structured dtype")
    return dtype


def _checked_shape(shape: Any) -> tuple[int, ...]:
    if type(shape) is not tuple or len(shape) > _MAX_DIMENSIONS:
        raise DecodingError("a shape that is no tuple of lengths")
    lengths: list[int] = [length for length in shape if type(length) is int and length >= 0]
    if len(lengths) != len(shape):
        raise DecodingError("a shape with something else than lengths")
    return tuple(lengths)


def _checked_data(decoder: Decoder, shape: Any, dtype: Any, raw: Any) -> tuple[int, ...]:
    """Return the shape of an array with the data ``raw``, after checking it."""
    checked = _checked_shape(shape)
    nbytes = math.prod(checked) * _checked_dtype(dtype).itemsize
    if type(raw) not in (bytes, bytearray) or len(raw) != nbytes:
        raise DecodingError(f"an array of {nbytes} bytes with other data")
    decoder.limits.charge(nbytes)
    return checked


def _array(decoder: Decoder, args: tuple[Any, ...]) -> Any:
    kind = args[0]
    if kind is np.ndarray:
        return np.ndarray((0,), np.int8)
    if isinstance(kind, type) and issubclass(kind, np.ndarray) and decoder.trust.holds(kind):
        return _make_array(kind, (0,), b"b")
    raise RefusedError(f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else type(kind).__name__)


def _array_state(decoder: Decoder, target: np.ndarray[Any, Any], state: Any) -> None:
    _version, shape, dtype, is_fortran, raw = state
    if isinstance(dtype, np.dtype) and dtype.kind == "O" and type(raw) is list:
        shape = _checked_shape(shape)
        if len(raw) != math.prod(shape):
            raise DecodingError(f"an array of {math.prod(shape)} objects with {len(raw)}")
        decoder.limits.charge(8 * len(raw))
        _check_nesting(decoder, target, raw)
    else:
        shape = _checked_data(decoder, shape, dtype, raw)
        raw = bytes(raw)
    target.__setstate__((1, shape, dtype, bool(is_fortran), raw))  # type: ignore[arg-type]


def _check_nesting(decoder: Decoder, target: Any, items: list[Any]) -> None:
    """Check the nesting of object arrays: freeing very deep ones overflows the stack."""
    inner = [decoder.array_depths.get(id(item), (None, 0))[1] for item in items if isinstance(item, np.ndarray)]
    depth = 1 + max(inner, default=0)
    if depth > _MAX_ARRAY_NESTING:
        raise DecodingError("arrays of objects nested beyond measure")
    # Keep a reference: the id of a freed object may be given to another one.
    decoder.array_depths[id(target)] = (target, depth)


def _scalar(decoder: Decoder, args: tuple[Any, ...]) -> Any:
    dtype, raw = args
    _checked_data(decoder, (), dtype, raw)
    return _make_scalar(dtype, bytes(raw))


def _from_buffer(decoder: Decoder, args: tuple[Any, ...]) -> Any:
    raw, dtype, shape, order = args
    shape = _checked_data(decoder, shape, dtype, raw)
    if order not in ("C", "F"):
        raise DecodingError(f"an array in order {order!r:.80}")
    return np.frombuffer(raw, dtype).reshape(shape, order=order)


def _masked(decoder: Decoder, args: tuple[Any, ...]) -> Any:
    if args[:2] != (np.ma.MaskedArray, np.ndarray):
        raise DecodingError("a masked array of another class")
    return _make_masked(np.ma.MaskedArray, np.ndarray, (0,), "b")


def _masked_state(decoder: Decoder, target: Any, state: Any) -> None:
    _version, shape, dtype, is_fortran, raw, mask, fill_value = state
    shape = _checked_data(decoder, shape, dtype, raw)
    _checked_data(decoder, shape, np.ma.make_mask_descr(dtype), mask)
    target.__setstate__((1, shape, dtype, bool(is_fortran), bytes(raw), bytes(mask), fill_value))


def _is_number(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit


def _is_words(value: Any, dtype: type, length: int) -> bool:
    return type(value) is np.ndarray and value.dtype == dtype and value.shape == (length,)


def _checked_state(state: Any) -> Any:
    """Return a bit generator's state whose positions lie within its buffers: NumPy does not look."""
    name, inner = state["bit_generator"], state["state"]
    if name in ("PCG64", "PCG64DXSM"):
        is_good = all(_is_number(inner[key], 1 << 128) for key in ("state", "inc"))
    elif name == "MT19937":
        is_good = _is_words(inner["key"], np.uint32, 624) and _is_number(inner["pos"], 625)
    elif name == "SFC64":
        is_good = _is_words(inner["state"], np.uint64, 4)
    else:
        is_good = _is_words(inner["counter"], np.uint64, 4) and _is_words(inner["key"], np.uint64, 2)
        is_good = is_good and _is_words(state["buffer"], np.uint64, 4) and _is_number(state["buffer_pos"], 5)
    if name != "MT19937":
        is_good = is_good and _is_number(state["has_uint32"], 2) and _is_number(state["uinteger"], 1 << 32)
    if not is_good:
        raise DecodingError(f"a state that no {name!r:.80} has")
    return state


def _bit_generator(decoder: Decoder, args: tuple[Any, ...]) -> Any:
    wanted = args[0] if args else "MT19937"
    kind = BIT_GENERATORS.get(wanted) if type(wanted) is str else wanted
    if not isinstance(kind, type) or kind not in BIT_GENERATORS.values():
        raise DecodingError("a bit generator that is not NumPy's")
    decoder.limits.charge(_GENERATOR_BYTES)
    # The pickle's state follows. The seed only keeps NumPy from asking the system for one.
    return kind(0)


def _bit_generator_state(decoder: Decoder, target: Any, state: Any) -> None:
    state, sequence = state if type(state) is tuple else (state, None)
    _check_kind(target, state)
    if sequence is None:
        target.state = _checked_state(state)
    elif type(sequence) is np.random.SeedSequence:
        target.__setstate__((_checked_state(state), sequence))
    else:
        raise DecodingError(f"the seed of a bit generator in a {type(sequence).__name__}")


def _check_kind(target: Any, state: Any) -> None:
    if type(state) is not dict or state.get("bit_generator") != type(target).__name__:
        raise DecodingError(f"a state of something else than {type(target).__name__}")


def _generator(decoder: Decoder, args: tuple[Any, ...]) -> np.random.Generator:
    return np.random.Generator(_given_bit_generator(decoder, args))


def _random_state(decoder: Decoder, args: tuple[Any, ...]) -> np.random.RandomState:
    return np.random.RandomState(_given_bit_generator(decoder, args))


def _given_bit_generator(decoder: Decoder, args: tuple[Any, ...]) -> Any:
    given = args[0] if args else "MT19937"
    return given if type(given) in BIT_GENERATORS.values() else _bit_generator(decoder, (given,))


def _generator_state(decoder: Decoder, target: np.random.Generator, state: Any) -> None:
    _check_kind(target.bit_generator, state)
    target.bit_generator.state = _checked_state(state)


def _random_state_state(decoder: Decoder, target: np.random.RandomState, state: Any) -> None:
    if type(state) is not dict or state.get("bit_generator") != "MT19937":
        raise DecodingError("a state of something else than MT19937")
    if not _is_number(state["has_gauss"], 2) or type(state["gauss"]) is not float:
        raise DecodingError("a state that no RandomState has")
    target.set_state(_checked_state(state))


def _seed_sequence(decoder: Decoder, args: tuple[Any, ...]) -> Draft:
    if args[0] is not np.random.SeedSequence or args[2:] != (None,):
        raise DecodingError("the seed of a bit generator")
    return Draft(_finished_sequence)


def _finished_sequence(decoder: Decoder, state: Any) -> np.random.SeedSequence:
    entropy, spawned, pool, pool_size, spawn_key, *_ = state
    parts = entropy if isinstance(entropy, (list, tuple)) else [entropy]
    if isinstance(entropy, np.ndarray):
        parts = entropy.ravel().tolist()
    is_good = all(type(part) is int and 0 <= part < _MAX_SEED for part in (*parts, spawned, *spawn_key))
    if not is_good or not _is_number(pool_size, _MAX_SEED_POOL):
        raise DecodingError("the seed of a bit generator")
    decoder.limits.charge(64 * len(parts))
    made = np.random.SeedSequence(entropy, spawn_key=spawn_key, pool_size=pool_size, n_children_spawned=spawned)
    if not np.array_equal(made.pool, pool):
        raise DecodingError("the seed of a bit generator, with a pool that it does not give")
    return made


@functools.cache
def builders() -> Builders:
    """Return the builders of NumPy's values."""
    names: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.random._pickle", "__bit_generator_ctor"): _BIT_GENERATOR,
        ("numpy.random._pickle", "__generator_ctor"): _GENERATOR,
        ("numpy.random._pickle", "__randomstate_ctor"): _RANDOM_STATE,
        ("numpy.random.bit_generator", "__pyx_unpickle_SeedSequence"): _SEED_SEQUENCE,
        ("numpy.random.bit_generator", "SeedSequence"): np.random.SeedSequence,
        ("numpy.ma.core", "_mareconstruct"): _MASKED,
        ("numpy.ma.core", "MaskedArray"): np.ma.MaskedArray,
        ("numpy.ma", "MaskedArray"): np.ma.MaskedArray,
    }
    # NumPy 2 renamed the module `core`.
    for core in ("numpy._core", "numpy.core"):
        names[f"{core}.multiarray", "_reconstruct"] = _RECONSTRUCT
        names[f"{core}.multiarray", "scalar"] = _SCALAR
        names[f"{core}.numeric", "_frombuffer"] = _FROM_BUFFER
    for kind in BIT_GENERATORS.values():
        names[kind.__module__, kind.__name__] = kind
    scalars = {np.dtype(code).type for code in "?bBhHiIlLqQefdgFDGSUVMm"}
    for kind in scalars:
        names[kind.__module__, kind.__name__] = kind
    reducers: dict[Any, Any] = {
        np.dtype: _dtype,
        _RECONSTRUCT: _array,
        _SCALAR: _scalar,
        _FROM_BUFFER: _from_buffer,
        _MASKED: _masked,
        _BIT_GENERATOR: _bit_generator,
        _GENERATOR: _generator,
        _RANDOM_STATE: _random_state,
        _SEED_SEQUENCE: _seed_sequence,
    }
    setters: dict[type, Any] = {
        np.ndarray: _array_state,
        np.ma.MaskedArray: _masked_state,
        np.random.Generator: _generator_state,
        np.random.RandomState: _random_state_state,
        **dict.fromkeys(BIT_GENERATORS.values(), _bit_generator_state),
    }
    return Builders(names, reducers, {}, setters)
