"""The versions of a model's modules, which say in which form a module has saved its part of the state dict.

``Module.state_dict()`` carries them in an attribute, ``_metadata``, and a module whose form has changed converts what
an earlier version of it has saved. A DCP checkpoint has no place for an attribute, so the versions are saved as JSON
beside the non-tensor part. Versions that are 1 are left out.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["encoded_versions", "set_versions", "versions_of_keys"]

Versions = Mapping[str, int]
"""The versions of the modules of a model, by path; a module that is not listed has version 1."""

_VERSION = "version"


def encoded_versions(parts: Mapping[str, Any]) -> str:
    """Return the versions of all models among the parts of a checkpoint, as JSON.

    Args:
        parts: State dicts by the names of the parts. The state dict of a model carries versions.
    """
    found: dict[str, dict[str, int]] = {}
    for name, part in parts.items():
        versions = getattr(part, "_metadata", None)
        if isinstance(versions, Mapping):
            numbers = {path: about.get(_VERSION) for path, about in versions.items()}
            found[name] = {path: number for path, number in numbers.items() if isinstance(number, int) and number != 1}
    return json.dumps(found)


def set_versions(state: Any, encoded: str | None, name: str) -> None:
    """Replace the versions in a state dict, which are the model's own, by those that were saved.

    Args:
        state: A state dict that carries the model's own versions.
        encoded: The result of `encoded_versions`. If it is None, the model's own versions stay.
        name: The name of the part.
    """
    own = getattr(state, "_metadata", None)
    saved = _decoded(encoded, name)
    if own is not None and saved is not None:
        state._metadata = OrderedDict((path, {**about, _VERSION: saved.get(path, 1)}) for path, about in own.items())


def versions_of_keys(keys: Iterable[str], encoded: str | None, name: str) -> OrderedDict[str, dict[str, int]] | None:
    """Return versions in the form of ``_metadata`` for the modules that the keys of a state dict name.

    Args:
        keys: The keys of the state dict.
        encoded: As in `set_versions`.
        name: The name of the part.
    """
    saved = _decoded(encoded, name)
    if saved is None:
        return None
    paths: OrderedDict[str, dict[str, int]] = OrderedDict({"": {_VERSION: saved.get("", 1)}})
    for key in keys:
        path = ""
        for element in key.split(".")[:-1]:
            path = f"{path}.{element}" if path else element
            paths.setdefault(path, {_VERSION: saved.get(path, 1)})
    return paths


def _decoded(encoded: str | None, name: str) -> Versions | None:
    if encoded is None:
        return None
    found = json.loads(encoded)
    versions = found.get(name) if isinstance(found, dict) else None
    return versions if isinstance(versions, dict) else None
