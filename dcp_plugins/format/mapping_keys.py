"""The keys of saved mappings: their texts in DCP's paths, and their forms in the record of mappings.

The record keeps simple keys as JSON. It keeps any other key as its text, which every reader understands, and beside the
text as a pickle, which a load decodes like a value.
"""

from __future__ import annotations

import base64
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dcp_plugins.errors import UnsupportedValueError

__all__ = ["PickledKey", "decoded_key", "encoded_key", "is_recordable", "recorded_key", "text_of"]

_MAX_KEY_DEPTH = 32
# The metadata is read in full by every rank.
_MAX_PICKLE_BYTES = 1 << 16
_NUMPY_NUMBERS = frozenset(
    {"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))}
    | {"float16", "float32", "float64"}
)
_KEY_TYPES = frozenset({str, int, bool, float, bytes})
_NUMBERS = frozenset({int, bool, float})


@dataclass(frozen=True, slots=True)
class PickledKey:
    """A key that the record keeps as a pickle; it stands for the key until a load decodes the pickle."""

    text: str
    """The key in DCP's paths."""
    pickled: bytes | None
    """The pickle, of protocol 2; None if the key cannot be pickled: then its text is all that was saved."""

    def __str__(self) -> str:
        return self.text


def text_of(key: Any) -> str:
    """Return the string that a path has for a key of a mapping: torch's, which is the key's own string.

    The members of a frozenset are sorted. Their own order differs between processes, so that ranks would save one
    value under several paths, and a load would not find the value.
    """
    kind = type(key)
    if kind is str:
        return str(key)
    if (kind is tuple or kind is frozenset) and _holds_frozenset(key):
        return _sorted_text(key)
    return str(key)


def _holds_frozenset(key: Any) -> bool:
    return type(key) is frozenset or (type(key) is tuple and any(map(_holds_frozenset, key)))


def _sorted_text(key: Any) -> str:
    if type(key) is tuple:
        parts = ", ".join(map(_sorted_text, key))
        return f"({parts},)" if len(key) == 1 else f"({parts})"
    if type(key) is not frozenset or not key:
        return repr(key)
    is_numbers = _NUMBERS.issuperset(map(type, key))
    texts = map(repr, sorted(key)) if is_numbers else sorted(map(_sorted_text, key))
    return f"frozenset({{{', '.join(texts)}}})"


def is_recordable(key: Any) -> bool:
    """Tell whether the record keeps a key as JSON."""
    if key is None or type(key) in _KEY_TYPES:
        return True
    is_number = isinstance(key, np.generic) and key.dtype.kind in "biuf"
    return is_number or (type(key) is tuple and all(map(is_recordable, key)))


def recorded_key(key: Any) -> Any:
    """Return the key itself if the record keeps it as JSON, else its `PickledKey`."""
    if type(key) is PickledKey or is_recordable(key):
        return key
    return PickledKey(text_of(key), _pickled(key))


def _pickled(key: Any) -> bytes | None:
    # A tensor's pickle has the data of its whole storage.
    if isinstance(key, (torch.Tensor, torch.nn.Module)):
        return None
    try:
        pickled = pickle.dumps(key, protocol=2)
    # The class of the key is the user's, and may raise anything.
    except Exception:
        return None
    return pickled if len(pickled) <= _MAX_PICKLE_BYTES else None


def encoded_key(key: Any, depth: int = 0) -> Any:
    """Return a key as a JSON value; a `PickledKey` as its text."""
    if key is None or type(key) in (str, int, bool):
        return key
    if type(key) is float:
        return {"float": key.hex()}
    if isinstance(key, np.generic) and is_recordable(key):
        return {"numpy": [key.dtype.name, key.tobytes().hex()]}
    if type(key) is bytes:
        return {"bytes": base64.b64encode(key).decode("ascii")}
    if type(key) is tuple and is_recordable(key):
        if depth > _MAX_KEY_DEPTH:
            raise UnsupportedValueError(f"a key of a state dict is a tuple nested more than {_MAX_KEY_DEPTH} deep")
        return [encoded_key(part, depth + 1) for part in key]
    return text_of(key)


def decoded_key(encoded: Any, depth: int = 0) -> Any:
    """Return the key of a JSON value.

    Raises:
        ValueError: It is no key.
    """
    if encoded is None or type(encoded) in (str, int, bool):
        return encoded
    if isinstance(encoded, list) and depth <= _MAX_KEY_DEPTH:
        return tuple(decoded_key(part, depth + 1) for part in encoded)
    if isinstance(encoded, dict) and len(encoded) == 1:
        ((kind, text),) = encoded.items()
        if kind == "float":
            return float.fromhex(text)
        if kind == "numpy" and text[0] in _NUMPY_NUMBERS:
            return np.frombuffer(bytes.fromhex(text[1]), dtype=text[0])[0]
        if kind == "bytes":
            return base64.b64decode(text, validate=True)
    raise ValueError(f"expected a key, found {encoded!r}")
