"""Decodes, at a load, the keys of mappings that a checkpoint has as pickles."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from typing import Any

from dcp_plugins.errors import CorruptCheckpointError, UnloadableValueWarning
from dcp_plugins.format.mapping_keys import PickledKey, text_of
from dcp_plugins.format.trust import SafeGlobal
from dcp_plugins.format.value_container import decode_value
from dcp_plugins.format.value_errors import DecodingError
from dcp_plugins.format.value_limits import Limits
from dcp_plugins.plan.flatten import KeyPath
from dcp_plugins.user_warnings import warn_user

__all__ = ["KeyDecoder", "saved_below"]


class KeyDecoder:
    """Puts the keys themselves into parts of a saved tree, where the tree has a `PickledKey` for a key.

    Args:
        weights_only: Decode keys as plain data. False runs whatever code their pickles name.
        safe_globals: Classes that keys may also have.
    """

    def __init__(self, *, weights_only: bool, safe_globals: Iterable[SafeGlobal]) -> None:
        self._weights_only = weights_only
        self._safe_globals = safe_globals
        self.texts: dict[KeyPath, dict[Any, str]] = {}
        """By the path of a mapping: the texts in the checkpoint's paths of the keys that were decoded."""

    def decode_keys(self, tree: Any, path: KeyPath) -> None:
        """Decode the keys in a tree of dicts and lists, in place.

        Args:
            tree: A part of what `saved_tree` returns; nothing is done to a value.
            path: The place of the part, as the checkpoint's paths have it.

        Raises:
            UnsafeCheckpointError: A key needs a class that is not admitted.
            CorruptCheckpointError: A pickle is damaged.
        """
        if isinstance(tree, list):
            for at, entry in enumerate(tree):
                self.decode_keys(entry, (*path, at))
        elif isinstance(tree, dict):
            for key, entry in tree.items():
                self.decode_keys(entry, (*path, text_of(key)))
            if PickledKey in set(map(type, tree)):
                entries = list(tree.items())
                tree.clear()
                for key, entry in entries:
                    own = self._decoded(key, path) if type(key) is PickledKey else key
                    if own in tree:
                        raise CorruptCheckpointError(f"{_place(path, key)} is equal to another key of the mapping")
                    tree[own] = entry

    def _decoded(self, key: PickledKey, path: KeyPath) -> Any:
        place = _place(path, key)
        if key.pickled is None:
            warn_user(
                f"{place} was saved as its string only, because it could not be pickled: the string takes its place",
                UnloadableValueWarning,
            )
            return key.text
        if self._weights_only:
            made = decode_value(
                key.pickled,
                place,
                safe_globals=self._safe_globals,
                advice="If you trust this checkpoint as you trust a program, load with weights_only=False",
            )
        else:
            try:
                made = pickle.loads(key.pickled)  # noqa: S301 - the user has chosen to run what the checkpoint names
            except (EOFError, pickle.UnpicklingError) as exc:
                raise CorruptCheckpointError(f"{place} cannot be read: {exc}") from exc
        try:
            Limits(len(key.pickled)).check_key(None, made)
            hash(made)
        except (DecodingError, TypeError) as exc:
            raise CorruptCheckpointError(f"{place} cannot be a key: {exc}") from exc
        self.texts.setdefault(path, {})[made] = key.text
        return made


def _place(path: KeyPath, key: Any) -> str:
    return f"the key {text_of(key)!r} of the mapping at {'.'.join(map(str, path))!r}"


def saved_below(tree: Mapping[Any, Any], path: tuple[Any, ...]) -> Any:
    """Return the part of a saved tree at a path with the keys of a template, or None where there is none."""
    found: Any = tree
    for key in path:
        if isinstance(found, list):
            found = found[key] if type(key) is int and key < len(found) else None
        elif isinstance(found, Mapping):
            text = text_of(key)
            pickled = (own for own in found if type(own) is PickledKey and own.text == text)
            found = found[key] if key in found else found.get(next(pickled, None))
        else:
            return None
    return found
