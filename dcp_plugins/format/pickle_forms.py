"""The usual forms of a metadata pickle, in which keys are cheap to hash: a quick test in place of ``check_costs``.

Hashing a key is dangerous only if the key is, or holds, a tuple: the instances that ``metadata_reader`` makes have no
hash, or check what they hash. Two forms are known: that of this package's writer, and that of ``pickle`` for a
``Metadata``. A pickle of either form has these properties:

- Each tuple in the memo is small. It holds numbers, strings, names, results of calls (a size has few dimensions), and
  small tuples of integers, but no reference to a tuple. So a reference costs little to hash, wherever it stands.
- A tuple that is not in the memo is hashed twice at most. Few of these hold tuples: they are not nested deeply.
- Few tuples stand where a dict's key may stand: keys may all have one hash, and are then compared with each other. The
  tuples of which there are many are the arguments of calls, the states of instances, and values in a dict.
- No dict that is the state of several instances is large.
- Nothing is called that makes tuples, or copies its arguments: ``metadata_reader`` refuses the names.

The patterns join the opcodes of what is usual, such as the description of a tensor, into one match, because a call of
``match`` takes longer than finding one opcode.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["has_cheap_keys", "without_frames"]

# Tuples that may be keys, or hold tuples.
_MAX_ODD_TUPLES = 64
# States of properties in our form: combinations of a data type and a few settings.
_MAX_STATES = 64
# Items of a tuple in the memo.
_MAX_ITEMS = 32
# Equal strings are compared byte by byte.
_MAX_STRING = 1 << 16

_MARK, _POP_MARK, _STRING, _SHORT_STRING, _MEMOIZE = b"(1X\x8c\x94"
_STRINGS = (_SHORT_STRING, _STRING)
_MARKED_TUPLE, _BEFORE_TUPLE_1 = 0x74, 0x84

# Kinds of the memo's entries. An atom is a string, a name, or what a call returned: a tuple may hold references to it.
_OTHER, _ATOM, _TUPLE = range(3)

_REFERENCE = rb"(?:h.|j.{4})"
_INTEGER = rb"(?:K.|M..|J.{4}|\x8a(?:" + b"|".join(rb"\x%02x.{%d}" % (size, size) for size in range(9)) + rb"))"
_SCALAR = rb"(?:" + _INTEGER + rb"|[N\x88\x89]|G.{8})"


def _expand(pattern: bytes) -> bytes:
    """Replace ``<name>`` by the part of that name."""
    return re.sub(rb"(?<!\?P)<([a-z ]+)>", lambda found: _PARTS[found[1]], pattern)


_PARTS = {
    b"ref": _REFERENCE,
    b"int": _INTEGER,
    b"scalar": _SCALAR,
    b"item": rb"(?:" + _REFERENCE + rb"|" + _SCALAR + rb")",
}
# Tuples of one to eight integers, and what follows the name of torch.Size.
_PARTS[b"ints"] = _expand(rb"(?:<int>(?:\x85|<int>(?:\x86|<int>\x87))|\(<int>{4,8}t)")
_PARTS[b"size"] = _expand(rb"<ints>\x94\x85\x94R\x94")
_PARTS[b"scalar size"] = rb"\)\x85\x94R\x94"


# -- The form of this package's writer: a mark, a pool in which everything is memoized, and a body in which nothing is.

_PARTS[b"pair"] = _expand(rb"<ref>(?:<item>(?:\x85|<item>(?:\x86|<item>\x87))|\(<item>{4,64}t)")
_POOL = re.compile(
    _expand(
        rb"(?P<name>\x93\x94)|(?P<size><ref>(?:\)|<ints>|\(<int>{9,64}t)\x85R\x94)"
        # The state of a chunk: two names and two sizes.
        rb"|(?P<chunk>}\(<ref><ref><ref><ref>u\x94)"
        rb"|\((?P<a><ref>)(?P<b><ref>)(?P<c><ref>)\x85R[\x88\x89](?P<d><ref>)J.{4}\x85R[\x88\x89](?:N|<ints>|\))?t\x94"
        rb"(?P<state>)"
    ),
    re.DOTALL,
)
_POOL_KINDS = {"name": _ATOM, "size": _ATOM, "chunk": _OTHER, "state": _TUPLE}
# The only tuples here are arguments of calls. The patterns have no groups, which would have to be saved at every step.
_RUN = re.compile(
    _expand(
        rb"(?:[N\x88\x89uebR]+|[hK].|[jJ].{4}|\)(?:\x81}\(|\x81?)|]\(|}\((?!<pair>)|G.{8}|<int>"
        rb"|[\x85\x86\x87]R|\(<item>{0,64}tR){1,1000}"
    ),
    re.DOTALL,
)
# Marks stand only here and in new containers: after a reference, a mark could begin more items of a shared state.
_ODD_TUPLE = re.compile(_expand(rb"[\x85\x86\x87]|\(<item>{0,64}t"), re.DOTALL)
# A dict whose keys are references and whose values are tuples: its beginning, and its other pairs.
_FIRST_PAIRS = re.compile(_expand(rb"}\((?:<pair>){1,1000}"), re.DOTALL)
_PAIRS = re.compile(_expand(rb"(?:<pair>){1,1000}"), re.DOTALL)


def _is_ours(data: bytes, position: int) -> bool:
    """Whether what follows the first mark is of the form of this package's writer."""
    num_states = 0
    kinds = bytearray()
    while (opcode := data[position]) != _POP_MARK:
        if opcode in _STRINGS:
            position, is_memoized = _skip_string(data, position)
            if is_memoized:
                kinds.append(_ATOM)
            continue
        found = _POOL.match(data, position)
        if found is None:
            return False
        position = found.end()
        kinds.append(_POOL_KINDS[found.lastgroup or ""])
        if found.lastgroup == "state":
            num_states += 1
            if num_states > _MAX_STATES or not _are_atoms(found.group("a", "b", "c", "d"), kinds):
                return False
    return _is_our_body(data, position + 1)


def _is_our_body(data: bytes, position: int) -> bool:
    num_odd = 0
    while num_odd <= _MAX_ODD_TUPLES:
        if found := _RUN.match(data, position):
            position = found.end()
        elif found := _FIRST_PAIRS.match(data, position):
            position = found.end()
            while found := _PAIRS.match(data, position):
                position = found.end()
        elif found := _ODD_TUPLE.match(data, position):
            num_odd += 1
            position = found.end()
        else:
            return data[position:] == b"."
    return False


def _skip_string(data: bytes, position: int) -> tuple[int, bool]:
    """Return where the opcode after a string begins, or after its MEMOIZE, and whether there is one."""
    if data[position] == _SHORT_STRING:
        position += 2 + data[position + 1]
    else:
        length = int.from_bytes(data[position + 1 : position + 5], "little")
        if length > _MAX_STRING:
            raise IndexError
        position += 5 + length
    is_memoized = data[position] == _MEMOIZE
    return position + is_memoized, is_memoized


def _are_atoms(references: Iterable[bytes], kinds: bytearray) -> bool:
    return all(kinds[int.from_bytes(reference[1:], "little")] == _ATOM for reference in references)


# -- The form of pickle, protocol 4 and 5: each object is memoized when it is made.

_PARTS[b"new"] = rb"\)\x81\x94"
_PARTS[b"new filled"] = rb"\)\x81\x94}\x94\("
_PARTS[b"chunk"] = _expand(rb"<ref><new filled><ref><ref><size><ref><ref><size>ub")
_PARTS[b"scalar chunk"] = _expand(rb"<ref><new filled><ref><ref><scalar size><ref><ref><scalar size>ub")
# After the state of an index comes the place in a file: as far as the path, which may be a new string.
_PARTS[b"place"] = _expand(rb"ub<ref><new filled><ref>(?:<ref><ref><int><ref><int>ub)?")
_STOCK = re.compile(
    _expand(
        rb"<chunk>(?:<chunk><chunk><chunk>(?:eub|e)?(?P<chunks>)|(?:eub|e)?(?P<chunk>))"
        rb"|<scalar chunk>(?:aub|eub|e)?(?P<scalar_chunk>)"
        rb"|<ref>(?:<new>(?:}\x94\((?:<ref>(?:"
        # A tensor: properties, size, and the list of chunks with the only chunk.
        rb"<ref><new>\((?P<state><ref><ref>[\x88\x89]<ref>[\x88\x89])(?:"
        rb"N?t\x94b<ref><ref><size><ref>]\x94(?:<chunk>aub(?P<whole_tensor>)|\(?(?P<tensor>))"
        rb"|<ints>\x94t\x94b<ref><ref><size><ref>]\x94(?:<chunk>aub(?P<whole_strided>)|\(?(?P<strided>))"
        rb"|[N)]?t\x94b<ref><ref><scalar size><ref>]\x94\(?(?P<scalar_tensor>))"
        # An index, and the place that follows it.
        rb"|<ref><ref>(?:N|<int>)(?:<ref><ref>(?:<size><place>(?P<entry>)|<scalar size><place>(?P<scalar_entry>))"
        rb"|<place>(?P<value_entry>))"
        rb"|(?P<head>))|(?P<open>))|(?P<made>))"
        # The same if the name of the index is a new string, and the end of a place whose path is one.
        rb"|(?:N|<int>)(?:<ref>(?:<ref>(?:<size><place>(?P<end>)|<scalar size><place>(?P<scalar_end>))"
        rb"|<int>ub(?P<place_end>))|<place>(?P<value_end>))"
        # A name and a tuple of one string.
        rb"|(?P<only><ref>)\x85\x94(?P<pair>)"
        rb"|(?P<reference>))"
        rb"|(?P<size><size>)|(?P<scalar_size><scalar size>)|(?P<ints><ints>\x94(?!R))"
        rb"|(?P<call>[t\x85\x86\x87]\x94R\x94)|(?P<tuple>[t\x85\x86\x87]\x94)|(?P<name>\x93\x94)"
        rb"|(?P<fresh><new>)|(?P<item><scalar>|\))"
        rb"|(?P<items>}\x94\()|(?P<dict>}\x94)|(?P<list>]\x94\(?)"
        rb"|(?P<mark>\()|(?P<more>u\()|(?P<close>(?:[easb]|u(?!\())+)"
    ),
    re.DOTALL,
)
_SIZE, _SCALAR_SIZE = bytes((_TUPLE, _TUPLE, _ATOM)), bytes((_TUPLE, _ATOM))
_NEW, _NEW_FILLED = bytes((_OTHER,)), bytes((_OTHER, _OTHER))
_CHUNK, _TENSOR = _NEW_FILLED + _SIZE + _SIZE, _NEW_FILLED + _NEW
_STATE, _LIST = bytes((_TUPLE,)), _NEW


def _by_group(kinds_of: dict[str, bytes]) -> list[bytes | None]:
    """Return what steps put into the memo, by the numbers of their groups."""
    table: list[bytes | None] = [None] * (_STOCK.groups + 1)
    for name, kinds in kinds_of.items():
        table[_STOCK.groupindex[name]] = kinds
    return table


# The steps that leave nothing on top of the stack that a tuple can be made of.
_OBJECTS = _by_group(
    {
        "chunk": _CHUNK,
        "chunks": _CHUNK * 4,
        "scalar_chunk": _NEW_FILLED + _SCALAR_SIZE + _SCALAR_SIZE,
        "whole_tensor": _TENSOR + _STATE + _SIZE + _LIST + _CHUNK,
        "tensor": _TENSOR + _STATE + _SIZE + _LIST,
        "whole_strided": _TENSOR + _STATE + _STATE + _SIZE + _LIST + _CHUNK,
        "strided": _TENSOR + _STATE + _STATE + _SIZE + _LIST,
        "scalar_tensor": _TENSOR + _STATE + _SCALAR_SIZE + _LIST,
        "value_entry": _NEW_FILLED + _NEW_FILLED,
        "entry": _NEW_FILLED + _SIZE + _NEW_FILLED,
        "scalar_entry": _NEW_FILLED + _SCALAR_SIZE + _NEW_FILLED,
        "value_end": _NEW_FILLED,
        "end": _SIZE + _NEW_FILLED,
        "scalar_end": _SCALAR_SIZE + _NEW_FILLED,
        "place_end": b"",
        "head": _NEW_FILLED,
        "open": _NEW_FILLED,
        "made": _NEW,
        "fresh": _NEW,
        "dict": _NEW,
        "list": _LIST,
        "close": b"",
    }
)
# The kinds of the entries that the other steps put into the memo.
_REST = {
    "call": bytes((_TUPLE, _ATOM)),
    "tuple": bytes((_TUPLE,)),
    "ints": bytes((_TUPLE,)),
    "name": bytes((_ATOM,)),
    "size": _SIZE,
    "scalar_size": _SCALAR_SIZE,
    "mark": b"",
    "items": _NEW,
    "more": b"",
}
_TENSORS = frozenset(
    _STOCK.groupindex[name] for name in ("whole_tensor", "tensor", "whole_strided", "strided", "scalar_tensor")
)
_IS_REFERENCE, _IS_PAIR, _IS_ITEM = (_STOCK.groupindex[name] for name in ("reference", "pair", "item"))
_STATE_GROUP, _ONLY_GROUP = _STOCK.groupindex["state"], _STOCK.groupindex["only"]
_REFERENCES = re.compile(_REFERENCE, re.DOTALL)
_UNKNOWN = -1


def _is_stock(data: bytes, position: int) -> bool:
    """Whether what follows the head is of the form of ``pickle``."""
    match = _STOCK.match
    kinds = bytearray()
    states: set[bytes] = set()
    num_odd = 0
    # The top of the stack, as far as it is known. Small tuples of integers are atoms here.
    num_atoms = 0  # So many atoms lie there, above anything else.
    is_marked = False  # Whether a mark lies below the atoms.
    num_in_dict = _UNKNOWN  # So many objects lie above a dict's mark: a tuple above an odd number of them is a value.
    while num_odd <= _MAX_ODD_TUPLES:
        if data[position] == _SHORT_STRING:
            position += 3 + data[position + 1]
            if data[position - 1] != _MEMOIZE:
                return False
            kinds.append(_ATOM)
            num_atoms += 1
            num_in_dict += num_in_dict >= 0
            continue
        found = match(data, position)
        if found is None:
            if data[position] != _STRING:
                return data[position:] == b"."
            position, is_memoized = _skip_string(data, position)
            if not is_memoized:
                return False
            kinds.append(_ATOM)
            num_atoms += 1
            num_in_dict += num_in_dict >= 0
            continue
        step = found.lastindex or 0
        start, position = position, found.end()
        made = _OBJECTS[step]
        if made is not None:
            kinds += made
            num_atoms, is_marked, num_in_dict = 0, False, _UNKNOWN
            if step in _TENSORS:
                state = found[_STATE_GROUP]
                if state not in states:
                    if not _are_atoms(_REFERENCES.findall(state), kinds):
                        return False
                    states.add(state)
        elif step == _IS_REFERENCE:
            index = data[start + 1] if position == start + 2 else int.from_bytes(data[start + 1 : position], "little")
            if kinds[index] != _ATOM:
                return False
            num_atoms += 1
            num_in_dict += num_in_dict >= 0
        elif step == _IS_PAIR:
            if not _are_atoms((found[_ONLY_GROUP], data[start : found.start(_ONLY_GROUP)]), kinds):
                return False
            kinds.append(_TUPLE)
            num_odd += num_in_dict < 0 or num_in_dict % 2
            num_in_dict += 2 if num_in_dict >= 0 else 0
            num_atoms, is_marked = 0, False
        elif step == _IS_ITEM:
            num_atoms += 1
            num_in_dict += num_in_dict >= 0
        else:
            name = found.lastgroup or ""
            kinds += _REST[name]
            if name in {"tuple", "call"}:
                opcode = data[start]
                num_items = num_atoms if opcode == _MARKED_TUPLE else opcode - _BEFORE_TUPLE_1
                if num_items > min(num_atoms, _MAX_ITEMS) or (opcode == _MARKED_TUPLE and not is_marked):
                    return False
                place = max(num_in_dict - num_items, _UNKNOWN)
                if name == "call" and opcode != _MARKED_TUPLE:  # The result replaces what is called.
                    num_atoms, num_in_dict = max(num_atoms - num_items, 1), place
                else:
                    num_odd += name == "tuple" and (place < 0 or place % 2 == 0)
                    num_atoms, is_marked = 0, False
                    num_in_dict = place + 1 if name == "tuple" and place >= 0 else place
            elif name == "ints":
                num_odd += num_in_dict < 0 or num_in_dict % 2 == 0
                num_atoms += 1
                num_in_dict += num_in_dict >= 0
            elif name == "name":  # Replaces two strings.
                num_atoms = max(num_atoms - 1, 1)
                num_in_dict = max(num_in_dict - 1, _UNKNOWN)
            elif name in {"size", "scalar_size"}:  # Replaces the name of the class.
                num_atoms = max(num_atoms, 1)
            elif name == "mark":
                num_atoms, is_marked = 0, True
            else:
                num_atoms, is_marked, num_in_dict = 0, False, 0
    return False


_HEADS = {b"\x80\x04", b"\x80\x05"}
_LENGTH_OF_HEAD = 2
_LENGTH_OF_FRAME = 9


def without_frames(data: bytes) -> bytes:
    """Return a pickle of protocol 4 or 5 without the headers of its frames, which ``pickle`` puts even into a tuple.

    A pickle whose frames are damaged is returned as it is.
    """
    if data[:_LENGTH_OF_HEAD] not in _HEADS:
        return data
    parts = [data[:_LENGTH_OF_HEAD]]
    position = _LENGTH_OF_HEAD
    while data[position : position + 1] == b"\x95":
        start = position + _LENGTH_OF_FRAME
        position = start + int.from_bytes(data[position + 1 : start], "little")
        parts.append(data[start:position])
    if position > len(data):
        return data
    return b"".join((*parts, data[position:]))


def has_cheap_keys(data: bytes) -> bool:
    """Whether the form of a pickle shows that it is cheap to read.

    It then ends with STOP, and all its opcodes are among those that ``metadata_reader`` admits.

    Args:
        data: What ``without_frames`` returned.
    """
    if data[:_LENGTH_OF_HEAD] not in _HEADS:
        return False
    try:
        if data[_LENGTH_OF_HEAD] == _MARK:
            return _is_ours(data, _LENGTH_OF_HEAD + 1)
        return _is_stock(data, _LENGTH_OF_HEAD)
    except IndexError:  # A string ends behind the pickle, or a reference leads to what is not in the memo.
        return False
