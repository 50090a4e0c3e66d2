"""The cost of unpickling, from the opcodes alone: refuses a pickle that costs far more than its length.

A pickle of some hundred bytes can describe a tuple that holds one tuple twice, which holds one tuple twice, and so on,
and use the outermost tuple as a key: hashing that key takes longer than anybody lives. A hundred thousand tuples inside
each other, as a key, overflow the interpreter's stack. Each of a hundred thousand keys that have one hash is compared
with all others. This module follows the opcodes and adds up such costs without making the objects. It knows every
pickle, but takes several times as long as the unpickler: ``pickle_forms`` finds the usual pickles that do not need it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

from dcp_plugins.format.value_errors import DecodingError

__all__ = ["check_costs"]

# A part is an object that hashing, comparing or copying visits: some ten nanoseconds. An honest pickle spends less than
# one part on each of its bytes.
_FREE_PARTS = 1 << 22
_PARTS_PER_BYTE = 4
# Hashing recurses in C.
_MAX_KEY_DEPTH = 100
_MOST_PARTS = 1 << 50
# Strings and bytes longer than this count as more than one part: equal ones are compared byte by byte.
_LONG = 4096
_BYTES_PER_PART = 8


class _Object:
    """Stands for an object that opcodes make, except small numbers, strings and constants, which stand for themselves.

    Attributes:
        parts: How many parts a hash of it visits, at most. A list, a dict or a set cannot be hashed: one part.
        depth: How deeply these parts are nested.
        hash: Its hash, if that is known.
        items: What it holds, for calls that copy it. Keys and values alternate for a dict.
        cost: The parts that were spent on hashing and comparing its own keys.
        has_safe_hash: Whether it has no hash, or one that nobody can choose and that takes little time: lists, dicts,
            sets, and what a call without arguments makes. ``metadata_reader`` makes such instances.
    """

    __slots__ = ("_num_keys", "cost", "depth", "has_safe_hash", "hash", "items", "parts")

    def __init__(self, items: Sequence[Any] = (), parts: int = 1, depth: int = 0) -> None:
        self.items = list(items)
        self.parts = parts
        self.depth = depth
        self.hash: int | None = None
        self.cost = 0
        self.has_safe_hash = False
        self._num_keys: dict[int | None, int] = {}

    def __hash__(self) -> int:
        if self.hash is None:
            raise TypeError("unknown hash")
        return self.hash

    def num_keys_with(self, known_hash: int | None) -> int:
        """Count one more key of this dict or set, and return how many have the hash."""
        number = self._num_keys[known_hash] = self._num_keys.get(known_hash, 0) + 1
        return number


def _parts(value: Any) -> int:
    if type(value) is _Object:
        return value.parts
    if type(value) in (str, bytes) and len(value) > _LONG:
        return 1 + len(value) // _BYTES_PER_PART
    return 1


def _holding(items: Sequence[Any]) -> _Object:
    """Return a tuple, or anything else whose hash is made of the hashes of what it holds."""
    parts, depth = 1, 0
    for item in items:
        parts += _parts(item)
        if type(item) is _Object:
            depth = max(depth, item.depth + 1)
    return _Object(items, min(parts, _MOST_PARTS), depth)


def _tuple(items: Sequence[Any]) -> _Object:
    made = _holding(items)
    if all(type(item) is not _Object or item.hash is not None for item in items):
        made.hash = hash(tuple(items))
    return made


def _container() -> _Object:
    made = _Object()
    made.has_safe_hash = True
    return made


# Opcodes that push a constant or a number, by the length of their argument, and those whose argument begins with its
# length.
_CONSTANTS = {b"N"[0]: None, 0x88: True, 0x89: False}
_INTEGERS = {b"K"[0]: (1, False), b"M"[0]: (2, False), b"J"[0]: (4, True)}
_LENGTHS = {**dict.fromkeys(b"\x8cC\x8a", 1), **dict.fromkeys(b"XB\x8b", 4), **dict.fromkeys(b"\x8d\x8e\x96", 8)}


class _Machine:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._parts_left = _FREE_PARTS + _PARTS_PER_BYTE * len(data)

    def _spend(self, parts: int) -> None:
        self._parts_left -= parts
        if self._parts_left < 0:
            raise DecodingError("objects that would take too long to hash, compare or copy")

    def _add_keys(self, container: _Object, keys: Iterable[Any]) -> None:
        """Spend what it costs to put ``keys`` into a dict or a set."""
        before = self._parts_left
        for key in keys:
            if type(key) is _Object:
                if key.depth > _MAX_KEY_DEPTH:
                    raise DecodingError("keys that are nested too deeply to be hashed")
                # A new key is compared with each one that has the same hash. Nobody can choose the hashes of strings.
                num_compared = 1 if key.has_safe_hash else container.num_keys_with(key.hash)
                self._spend(key.parts * num_compared)
            elif type(key) in (str, bytes):
                self._spend(_parts(key))
            else:
                self._spend(container.num_keys_with(hash(key)))
        container.cost += before - self._parts_left

    def _fill(self, container: Any, items: Sequence[Any], keys: Sequence[Any]) -> None:
        """Put items into a list, a dict or a set."""
        if type(container) is not _Object:
            raise DecodingError("something put into an object that holds nothing")
        container.items += items
        self._add_keys(container, keys)

    def _call(self, arguments: Any) -> _Object:
        """Return what a call makes. It may copy the items of each argument, use them as keys, or read them as pairs."""
        given = arguments.items if type(arguments) is _Object else []
        copied: list[Any] = []
        for argument in given:
            if type(argument) is not _Object:
                self._spend(_parts(argument))
                copied.append(argument)
                continue
            self._spend(argument.parts + argument.cost)
            self._add_keys(_Object(), argument.items)
            pairs = [item for item in argument.items if type(item) is _Object]
            self._spend(sum(len(pair.items) for pair in pairs))
            self._add_keys(_Object(), [pair.items[0] for pair in pairs if pair.items])
            copied += argument.items or [argument]
        made = _holding(copied)
        made.has_safe_hash = not given
        return made

    def _build(self, state: Any) -> None:
        """Spend what it costs to copy a state into an instance, and to look up whether its properties are known."""
        self._add_keys(_Object(), [state])
        states = [state]
        if type(state) is _Object and len(state.items) == 2:
            states += state.items
        for each in states:
            if type(each) is _Object:
                self._spend(each.cost + len(each.items))

    def _argument(self, opcode: int, position: int) -> tuple[Any, int]:
        """Return what an opcode with an argument of variable length pushes, and where the next one begins."""
        data, size = self._data, _LENGTHS[opcode]
        start = position + size
        end = start + int.from_bytes(data[position:start], "little")
        content = data[start:end]
        if opcode in b"\x8cX\x8d":
            return content.decode("utf-8", "surrogatepass"), end
        if opcode in b"\x8a\x8b":
            if len(content) <= 8:
                return int.from_bytes(content, "little", signed=True), end
            # Any number of these may have one hash, and each hash visits the whole number.
            return _Object((), 1 + len(content) // _BYTES_PER_PART), end
        return (_container() if opcode == 0x96 else content), end

    def run(self) -> int:
        data, position = self._data, 0
        stack: list[Any] = []
        outer: list[list[Any]] = []
        memo: dict[int, Any] = {}
        while True:
            opcode = data[position]
            position += 1
            if opcode in _CONSTANTS:
                stack.append(_CONSTANTS[opcode])
            elif opcode in _INTEGERS:
                size, signed = _INTEGERS[opcode]
                stack.append(int.from_bytes(data[position : position + size], "little", signed=signed))
                position += size
            elif opcode in _LENGTHS:
                pushed, position = self._argument(opcode, position)
                stack.append(pushed)
            elif opcode == 0x94:  # MEMOIZE
                memo[len(memo)] = stack[-1]
            elif opcode in b"hqjr":  # BINGET, BINPUT, LONG_BINGET, LONG_BINPUT
                size = 1 if opcode in b"hq" else 4
                index = int.from_bytes(data[position : position + size], "little")
                position += size
                if opcode in b"hj":
                    stack.append(memo[index])
                else:
                    memo[index] = stack[-1]
            elif opcode == 0x28:  # MARK
                outer.append(stack)
                stack = []
            elif opcode == 0x74:  # TUPLE
                items, stack = stack, outer.pop()
                stack.append(_tuple(items))
            elif opcode in b"\x85\x86\x87":  # TUPLE1 to TUPLE3
                items = stack[0x84 - opcode :]
                del stack[0x84 - opcode :]
                stack.append(_tuple(items))
            elif opcode == 0x29:  # EMPTY_TUPLE
                stack.append(_tuple(()))
            elif opcode in b"]}\x8f":  # EMPTY_LIST, EMPTY_DICT, EMPTY_SET
                stack.append(_container())
            elif opcode == 0x91:  # FROZENSET
                items, stack = stack, outer.pop()
                self._add_keys(_Object(), items)
                stack.append(_holding(items))
            elif opcode in b"as":  # APPEND, SETITEM
                count = 1 if opcode == 0x61 else 2
                items = stack[-count:]
                del stack[-count:]
                self._fill(stack[-1], items, items[:-1])
            elif opcode in b"eu\x90":  # APPENDS, SETITEMS, ADDITEMS
                items, stack = stack, outer.pop()
                self._fill(stack[-1], items, items if opcode == 0x90 else items[::2] if opcode == 0x75 else ())
            elif opcode in b"R\x81":  # REDUCE, NEWOBJ
                arguments = stack.pop()
                stack[-1] = self._call(arguments)
            elif opcode == 0x92:  # NEWOBJ_EX
                named, arguments = stack.pop(), stack.pop()
                stack[-1] = self._call(_Object([named, *getattr(arguments, "items", ())]))
            elif opcode == 0x62:  # BUILD
                self._build(stack.pop())
            elif opcode == 0x63:  # GLOBAL
                position = data.index(b"\n", data.index(b"\n", position) + 1) + 1
                stack.append(None)
            elif opcode == 0x93:  # STACK_GLOBAL
                stack[-2:] = [None]
            elif opcode == 0x30 and stack:  # POP
                stack.pop()
            elif opcode in b"01":  # POP_MARK, or POP of a mark
                stack = outer.pop()
            elif opcode == 0x47:  # BINFLOAT
                stack.append(struct.unpack_from(">d", data, position)[0])
                position += 8
            elif opcode == 0x80:  # PROTO
                position += 1
            elif opcode == 0x95:  # FRAME
                position += 8
            elif opcode == 0x2E:  # STOP
                return _FREE_PARTS + _PARTS_PER_BYTE * len(data) - self._parts_left
            else:
                raise DecodingError(f"opcode {bytes((opcode,))!r} at byte {position - 1}")


def check_costs(data: bytes) -> int:
    """Check that the length of a pickle bounds the time and the stack that unpickling takes.

    Returns:
        How many parts unpickling hashes, compares and copies, at most.

    Raises:
        DecodingError: It does not, or its opcodes do not fit together.
    """
    try:
        return _Machine(data).run()
    except DecodingError:
        raise
    # Opcodes take from an empty stack, refer to what is not in the memo, or have an argument that is cut off.
    except (IndexError, KeyError, ValueError, struct.error) as exc:
        raise DecodingError(f"opcodes that do not fit together ({type(exc).__name__}: {exc})") from exc
