"""The classes and functions that the user has declared safe to load.

The list is torch's: ``torch.serialization.add_safe_globals`` adds to it for the whole process, and the argument
``safe_globals`` of a load adds to it for that load. An entry is a class or function, or a pair of one and the name
under which a pickle has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dcp_plugins.format.value_errors import RefusedError

__all__ = ["SafeGlobal", "Trust", "admitted_by_torch", "check_safe_globals"]

SafeGlobal = Callable[..., Any] | tuple[Callable[..., Any], str]

# Torch refuses these modules even if the user declares them safe: their functions act on the system.
_BLOCKED_MODULES = frozenset({"nt", "os", "posix", "sys"})


class Trust:
    """The classes and functions that one load may call as pickle does, by name.

    Args:
        safe_globals: Trusted for this load, in addition to torch's list as it is when it is first needed.
    """

    def __init__(self, safe_globals: Iterable[SafeGlobal] = ()) -> None:
        self._safe_globals = safe_globals
        self._by_name: dict[str, Any] | None = None
        self._identities: frozenset[int] = frozenset()

    def find(self, module: str, name: str) -> Any:
        """Return the trusted class or function of this name.

        Raises:
            RefusedError: It is not trusted.
        """
        full_name = f"{module}.{name}"
        names = self._names()
        if full_name not in names:
            raise RefusedError(full_name)
        if module in _BLOCKED_MODULES:
            raise RefusedError(full_name, "is of a module that is never admitted")
        return names[full_name]

    def holds(self, thing: Any) -> bool:
        """Tell whether a class or function is trusted."""
        self._names()
        return id(thing) in self._identities

    def _names(self) -> dict[str, Any]:
        if self._by_name is None:
            # Built when first needed: most values need no trust, and a load has thousands.
            entries = [*torch.serialization.get_safe_globals(), *self._safe_globals]
            self._by_name = dict(map(_named, entries))
            self._identities = frozenset(map(id, self._by_name.values()))
        return self._by_name


def _named(entry: SafeGlobal) -> tuple[str, Any]:
    if isinstance(entry, tuple):
        return entry[1], entry[0]
    return f"{entry.__module__}.{entry.__qualname__}", entry


@contextmanager
def admitted_by_torch(safe_globals: Iterable[SafeGlobal]) -> Iterator[None]:
    """Add classes to torch's list of safe globals in a block that reads a file with ``torch.load``."""
    known = torch.serialization.get_safe_globals()
    # Torch's own context manager would, at its end, remove classes that the user had added before.
    with torch.serialization.safe_globals([entry for entry in safe_globals if entry not in known]):
        yield


def check_safe_globals(safe_globals: Iterable[SafeGlobal]) -> tuple[SafeGlobal, ...]:
    """Return the entries of an argument ``safe_globals`` as a tuple.

    Raises:
        TypeError: An entry is no class or function, nor a pair of one and its name.
    """
    entries = tuple(safe_globals)
    for entry in entries:
        thing, name = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, "")
        if not hasattr(thing, "__qualname__") or not isinstance(name, str):
            raise TypeError(
                "safe_globals expects classes or functions, or pairs of one and the name by which it was saved,"
                f" got {entry!r}"
            )
    return entries
