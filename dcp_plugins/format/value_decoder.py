"""Decodes a pickle of values without running what it names: a machine for the opcodes, which asks builders for objects.

The machine makes plain data itself: numbers, strings, bytes, lists, tuples, dicts and sets. An object of any other
class comes from a *builder*, a function of ours that takes the fields in the pickle, checks them and makes the object
(``value_builders``). A class is only called, or given a state, if the user has declared it safe (``trust``).

The work is bounded by the length of the pickle: the stack holds lists, never frames of the interpreter, so nesting of
any depth costs no recursion; and ``value_limits`` counts what a few opcodes could repeat without end.
"""

from __future__ import annotations

import _compat_pickle
import collections
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dcp_plugins.format.trust import Trust
from dcp_plugins.format.value_errors import DecodingError, RefusedError
from dcp_plugins.format.value_limits import Limits

__all__ = ["Builders", "Decoder", "Draft", "Function"]

_double = struct.Struct(">d").unpack_from
_int4 = struct.Struct("<i").unpack_from
_uint2 = struct.Struct("<H").unpack_from
_uint4 = struct.Struct("<I").unpack_from
_uint8 = struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """Stands for a function that a pickle may name. It cannot be called: the machine calls the function's builder."""

    name: str


class Draft:
    """An object that can only be made once its state is known, such as a NumPy dtype."""

    __slots__ = ("finish", "position")

    def __init__(self, finish: Callable[[Decoder, Any], Any]) -> None:
        self.finish = finish
        self.position: int | None = None
        """Where the memo holds the draft."""


Reducer = Callable[["Decoder", tuple[Any, ...]], Any]


@dataclass(frozen=True, slots=True)
class Builders:
    """The names that a pickle may use, and the builders of their objects."""

    names: Mapping[tuple[str, str], Any]
    """(module, name) -> the class itself, a value, or a `Function`."""
    reducers: Mapping[Any, Reducer]
    """Class or `Function` -> makes the object from the arguments it would be called with (opcode REDUCE)."""
    makers: Mapping[type, Reducer]
    """Class -> makes the object from the arguments of its ``__new__`` (opcode NEWOBJ)."""
    setters: Mapping[type, Callable[[Decoder, Any, Any], None]]
    """Exact class of an object -> gives the object the state in the pickle (opcode BUILD)."""


def no_storage(pid: Any) -> Any:
    raise DecodingError("a tensor's data outside a container")


class Decoder:
    """Decodes one pickle.

    Args:
        data: Holds the pickle.
        builders: Builds what is not plain data.
        trust: What the user has declared safe.
        load_storage: Returns the storage that a persistent id names.
        position: Where in ``data`` the pickle begins, in bytes; after `load`, where it ended.
        size: Length in bytes of what the pickle may make copies of; None takes the length of ``data``.
    """

    def __init__(
        self,
        data: bytes,
        builders: Builders,
        trust: Trust,
        *,
        load_storage: Callable[[Any], Any] = no_storage,
        position: int = 0,
        size: int | None = None,
    ) -> None:
        self.data = data
        self.position = position
        self.trust = trust
        self.load_storage = load_storage
        self._builders = builders
        self.limits = Limits(len(data) if size is None else size)
        self._num_drafts = 0
        self._has_new_names = False
        self.array_depths: dict[int, tuple[Any, int]] = {}
        """How deep arrays of objects are nested, by the id of the array."""
        self.deferred: list[Callable[[], None]] = []
        """Checks of tensors to make after the storages were filled."""

    def load(self) -> Any:
        """Return the value of the pickle, which ends at its STOP opcode."""
        value = self._run()
        if self._num_drafts:
            raise DecodingError("a dtype without its state")
        return value

    def reduce(self, function: Any, args: Any) -> Any:
        """Return the object that the builder of a class or function makes from arguments."""
        if type(args) is not tuple:
            raise DecodingError(f"arguments in a {type(args).__name__}")
        # Any other object may be slow to hash.
        if isinstance(function, (Function, type)):
            reducer = self._builders.reducers.get(function)
            if reducer is not None:
                return reducer(self, args)
        if self.trust.holds(function):
            return function(*args)
        raise RefusedError(_name_of(function), "is called")

    def set_items(self, target: Any, items: list[Any]) -> None:
        """Put ``[key, value, key, value, ...]`` into a mapping."""
        if target.__class__ not in _MAPPINGS and not self.trust.holds(type(target)):
            raise DecodingError(f"items for a {type(target).__name__}")
        for at in range(0, len(items), 2):
            key = items[at]
            if key.__class__ is not str:
                self.limits.check_key(target, key)
            target[key] = items[at + 1]

    def _add_items(self, target: Any, items: list[Any]) -> None:
        if target.__class__ is not set and not self.trust.holds(type(target)):
            raise DecodingError(f"members for a {type(target).__name__}")
        for item in items:
            self.limits.check_key(target, item)
            target.add(item)

    def _extend(self, target: Any, items: list[Any]) -> None:
        if target.__class__ is list or target.__class__ is collections.deque:
            target.extend(items)
            return
        if not self.trust.holds(type(target)):
            raise DecodingError(f"items for a {type(target).__name__}")
        # Pickle itself appends in this way to subclasses of list.
        if hasattr(target, "extend"):
            target.extend(items)
        else:
            for item in items:
                target.append(item)

    def _new(self, kind: Any, args: Any, kwargs: Any) -> Any:
        if type(args) is not tuple or type(kwargs) is not dict:
            raise DecodingError("arguments that are no tuple")
        if isinstance(kind, type):
            maker = self._builders.makers.get(kind)
            if maker is not None and not kwargs:
                return maker(self, args)
            if self.trust.holds(kind):
                return kind.__new__(kind, *args, **kwargs)
        raise RefusedError(_name_of(kind), "is instantiated")

    def _build(self, target: Any, state: Any) -> None:
        setter = self._builders.setters.get(type(target))
        if setter is not None:
            setter(self, target, state)
        elif not self.trust.holds(type(target)):
            raise RefusedError(_name_of(type(target)), "is given a state")
        elif hasattr(target, "__setstate__"):
            target.__setstate__(state)
        else:
            slots = None
            if type(state) is tuple and len(state) == 2:
                state, slots = state
            if state:
                target.__dict__.update(state)
            for name, value in (slots or {}).items():
                setattr(target, name, value)

    def _find(self, module: str, name: str) -> Any:
        if not self._has_new_names:
            # Protocols 0 to 2 use the module names of Python 2.
            if (module, name) in _compat_pickle.NAME_MAPPING:
                module, name = _compat_pickle.NAME_MAPPING[module, name]
            else:
                module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        found = self._builders.names.get((module, name), self)
        return self.trust.find(module, name) if found is self else found

    def _line(self, position: int) -> tuple[str, int]:
        end = self.data.index(b"\n", position)
        return self.data[position:end].decode(), end + 1

    def _bytes(self, position: int, length: int) -> bytes:
        content = self.data[position : position + length]
        if len(content) != length:
            raise DecodingError("it is cut short")
        return content

    def _note(self, draft: Draft, position: int, memo: dict[int, Any]) -> None:
        """Remember the memo key of a draft, if the opcode at ``position`` memoises it."""
        self._num_drafts += 1
        opcode = self.data[position : position + 1]
        if opcode == b"q":
            draft.position = self.data[position + 1]
        elif opcode == b"r":
            draft.position = _uint4(self.data, position + 1)[0]
        elif opcode == b"\x94":
            draft.position = len(memo)

    def _finish(self, draft: Draft, state: Any, memo: dict[int, Any]) -> Any:
        finished = draft.finish(self, state)
        self._num_drafts -= 1
        if draft.position is not None and memo.get(draft.position) is draft:
            memo[draft.position] = finished
        return finished

    def _run(self) -> Any:  # One loop: a call for each opcode would double the time of a large value.
        data, position = self.data, self.position
        stack: list[Any] = []
        outer: list[list[Any]] = []
        memo: dict[int, Any] = {}
        while True:
            opcode = data[position]
            position += 1
            # The most frequent opcodes come first.
            if opcode == 0x71:  # BINPUT
                memo[data[position]] = stack[-1]
                position += 1
            elif opcode == 0x4B:  # BININT1
                stack.append(data[position])
                position += 1
            elif opcode == 0x68:  # BINGET
                stack.append(memo[data[position]])
                position += 1
            elif opcode == 0x58:  # BINUNICODE
                end = position + 4 + _uint4(data, position)[0]
                if end > len(data):
                    raise DecodingError("it is cut short")
                stack.append(str(data[position + 4 : end], "utf-8", "surrogatepass"))
                position = end
            elif opcode == 0x72:  # LONG_BINPUT
                memo[_uint4(data, position)[0]] = stack[-1]
                position += 4
            elif opcode == 0x6A:  # LONG_BINGET
                stack.append(memo[_uint4(data, position)[0]])
                position += 4
            elif opcode == 0x47:  # BINFLOAT
                stack.append(_double(data, position)[0])
                position += 8
            elif opcode == 0x4A:  # BININT
                stack.append(_int4(data, position)[0])
                position += 4
            elif opcode == 0x4D:  # BININT2
                stack.append(_uint2(data, position)[0])
                position += 2
            elif opcode == 0x94:  # MEMOIZE
                memo[len(memo)] = stack[-1]
            elif opcode == 0x4E:  # NONE
                stack.append(None)
            elif opcode == 0x88:  # NEWTRUE
                stack.append(True)
            elif opcode == 0x89:  # NEWFALSE
                stack.append(False)
            elif opcode == 0x28:  # MARK
                outer.append(stack)
                stack = []
            elif opcode == 0x74:  # TUPLE
                items, stack = stack, outer.pop()
                stack.append(tuple(items))
            elif opcode == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif opcode == 0x86:  # TUPLE2
                last = stack.pop()
                stack[-1] = (stack[-1], last)
            elif opcode == 0x87:  # TUPLE3
                stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
            elif opcode == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif opcode == 0x5D:  # EMPTY_LIST
                stack.append([])
            elif opcode == 0x7D:  # EMPTY_DICT
                stack.append({})
            elif opcode == 0x61:  # APPEND
                item = stack.pop()
                self._extend(stack[-1], [item])
            elif opcode == 0x65:  # APPENDS
                items, stack = stack, outer.pop()
                self._extend(stack[-1], items)
            elif opcode == 0x73:  # SETITEM
                items = stack[-2:]
                del stack[-2:]
                self.set_items(stack[-1], items)
            elif opcode == 0x75:  # SETITEMS
                items, stack = stack, outer.pop()
                self.set_items(stack[-1], items)
            elif opcode == 0x52:  # REDUCE
                args = stack.pop()
                made = stack[-1] = self.reduce(stack[-1], args)
                if made.__class__ is Draft:
                    self._note(made, position, memo)
            elif opcode == 0x62:  # BUILD
                state = stack.pop()
                if stack[-1].__class__ is Draft:
                    stack[-1] = self._finish(stack[-1], state, memo)
                else:
                    self._build(stack[-1], state)
            elif opcode == 0x51:  # BINPERSID
                stack[-1] = self.load_storage(stack[-1])
            elif opcode == 0x63:  # GLOBAL
                module, position = self._line(position)
                name, position = self._line(position)
                stack.append(self._find(module, name))
            elif opcode == 0x93:  # STACK_GLOBAL
                name = stack.pop()
                module = stack.pop()
                if type(name) is not str or type(module) is not str:
                    raise DecodingError("a name that is no string")
                stack.append(self._find(module, name))
            elif opcode == 0x81:  # NEWOBJ
                args = stack.pop()
                stack[-1] = self._new(stack[-1], args, {})
            elif opcode == 0x92:  # NEWOBJ_EX
                kwargs = stack.pop()
                args = stack.pop()
                stack[-1] = self._new(stack[-1], args, kwargs)
            elif opcode == 0x8C:  # SHORT_BINUNICODE
                length = data[position]
                stack.append(str(self._bytes(position + 1, length), "utf-8", "surrogatepass"))
                position += 1 + length
            elif opcode == 0x8D:  # BINUNICODE8
                length = _uint8(data, position)[0]
                stack.append(str(self._bytes(position + 8, length), "utf-8", "surrogatepass"))
                position += 8 + length
            elif opcode == 0x43:  # SHORT_BINBYTES
                length = data[position]
                stack.append(self._bytes(position + 1, length))
                position += 1 + length
            elif opcode == 0x42:  # BINBYTES
                length = _uint4(data, position)[0]
                stack.append(self._bytes(position + 4, length))
                position += 4 + length
            elif opcode in (0x8E, 0x96):  # BINBYTES8, BYTEARRAY8
                length = _uint8(data, position)[0]
                content = self._bytes(position + 8, length)
                stack.append(content if opcode == 0x8E else bytearray(content))
                position += 8 + length
            elif opcode == 0x55:  # SHORT_BINSTRING, of Python 2
                length = data[position]
                stack.append(str(self._bytes(position + 1, length), "utf-8"))
                position += 1 + length
            elif opcode == 0x8A:  # LONG1
                length = data[position]
                stack.append(int.from_bytes(self._bytes(position + 1, length), "little", signed=True))
                position += 1 + length
            elif opcode == 0x8B:  # LONG4
                length = _uint4(data, position)[0]
                stack.append(int.from_bytes(self._bytes(position + 4, length), "little", signed=True))
                position += 4 + length
            elif opcode == 0x8F:  # EMPTY_SET
                stack.append(set())
            elif opcode == 0x90:  # ADDITEMS
                items, stack = stack, outer.pop()
                self._add_items(stack[-1], items)
            elif opcode == 0x91:  # FROZENSET
                items, stack = stack, outer.pop()
                for item in items:
                    self.limits.check_key(items, item)
                stack.append(frozenset(items))
            elif opcode == 0x30:  # POP: a tuple that contains itself
                if stack:
                    stack.pop()
                else:
                    stack = outer.pop()
            elif opcode == 0x31:  # POP_MARK
                stack = outer.pop()
            elif opcode == 0x80:  # PROTO
                if data[position] > 5:
                    raise DecodingError(f"pickle protocol {data[position]}")
                self._has_new_names = data[position] >= 3
                position += 1
            elif opcode == 0x95:  # FRAME
                position += 8
            elif opcode == 0x2E:  # STOP
                self.position = position
                return stack.pop()
            else:
                raise DecodingError(f"opcode {bytes((opcode,))!r} at byte {position - 1}")


_MAPPINGS = frozenset({dict, collections.OrderedDict, collections.defaultdict, collections.Counter})


def _name_of(thing: Any) -> str:
    if isinstance(thing, Function):
        return thing.name
    if isinstance(thing, type):
        return f"{thing.__module__}.{thing.__qualname__}"
    return f"a {type(thing).__name__}"
