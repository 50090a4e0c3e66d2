"""State dicts of a checkpoint that read a value from the checkpoint's files when the value is asked for.

Hooks such as ``on_load_checkpoint`` see them in ``checkpoint["state_dict"]`` and ``checkpoint["optimizer_states"]``. A
hook may read, replace, rename and delete entries as in an ordinary dict. The restore loads the entries that nobody has
asked for straight into the module's memory, and takes all others from the dict.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from dcp_plugins.lightning.checkpoint_part import CheckpointPart
from dcp_plugins.lightning.module_versions import versions_of_keys
from dcp_plugins.state_dict.flatten import GROUPS, PARAMS, STATE

__all__ = ["LazyOptimizerState", "LazyState"]


class _Unread:
    """Stands for a value that is still in the checkpoint."""


_UNREAD = _Unread()


class LazyState(OrderedDict[str, Any]):
    """A part of a checkpoint as an ``OrderedDict`` that reads a value when the value is asked for.

    Keys are known from the start. Asking for one value reads this value. Asking for all values, or comparing, copying
    or pickling the dict, reads all unread values with one read. A value that has been read stays in memory. Copies and
    pickles of the dict are ordinary dicts with all values.

    Args:
        source: The part of the checkpoint. Code that makes a new dict of this dict's class gives a mapping or pairs, as
            for an ``OrderedDict``.
    """

    part: CheckpointPart | None = None
    """The part of the checkpoint; None for a mapping that was made of values."""

    def __init__(self, source: CheckpointPart | Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        super().__init__(() if isinstance(source, CheckpointPart) else source)
        if isinstance(source, CheckpointPart):
            self._open(source)

    def _open(self, part: CheckpointPart) -> None:
        self.part = part
        versions = versions_of_keys(part.keys, part.versions, part.name)
        if versions is not None:
            # ``Module.load_state_dict`` reads the versions from this attribute.
            self._metadata = versions
        for key in part.keys:
            self[key] = _UNREAD

    @property
    def unread(self) -> list[str]:
        """The keys whose values nobody has asked for, replaced or deleted."""
        return [key for key in self if super(LazyState, self).__getitem__(key) is _UNREAD]

    @property
    def is_untouched(self) -> bool:
        """Whether nobody has asked for a value, and no key was added or deleted."""
        return self.part is not None and len(self) == len(self.part.keys) == len(self.unread)

    def read_all(self) -> None:
        """Read all values that are still unread. The dict does not need the checkpoint's files afterwards."""
        self._read(self.unread)

    def _read(self, keys: list[str]) -> None:
        if keys:
            for key, value in self._values(keys).items():
                self[key] = value

    def _values(self, keys: list[str]) -> Mapping[str, Any]:
        assert self.part is not None
        return self.part.read(keys)

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value is not _UNREAD:
            return value
        self._read([key])
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key in self:
            return self[key]
        return default

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: str, *default: Any) -> Any:
        if key in self:
            self._read([key] if super().__getitem__(key) is _UNREAD else [])
        return super().pop(key, *default)

    def popitem(self, last: bool = True) -> tuple[str, Any]:
        self.read_all()
        return super().popitem(last)

    def values(self) -> Any:
        self.read_all()
        return super().values()

    def items(self) -> Any:
        self.read_all()
        return super().items()

    def __eq__(self, other: object) -> bool:
        return bool(self._as_ordinary() == other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def __or__(self, other: Any) -> Any:
        return self._as_ordinary() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._as_ordinary()

    def __repr__(self) -> str:
        return repr(self._as_ordinary())

    def copy(self) -> Any:
        return self._as_ordinary()

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._as_ordinary(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._as_ordinary().__reduce_ex__(protocol)

    def _as_ordinary(self) -> OrderedDict[str, Any]:
        made: OrderedDict[str, Any] = OrderedDict(self.items())
        if hasattr(self, "_metadata"):
            made._metadata = self._metadata  # type: ignore[attr-defined]
        return made


class LazyOptimizerState(LazyState):
    """The state of an optimizer, as ``Optimizer.state_dict`` returns it, with the parameters numbered.

    The checkpoint has the parameters' names in the place of their numbers. A state dict of another form is given as it
    was saved.

    Args:
        source: As for `LazyState`.
    """

    _groups: list[dict[str, Any]] | None = None

    def _open(self, part: CheckpointPart) -> None:
        super()._open(part)
        if GROUPS in self and STATE not in self:
            # Checkpoints of stock torch do not record an empty state.
            self[STATE] = {}

    @property
    def names(self) -> list[list[str]] | None:
        """The names of the parameters, by group; None if the checkpoint does not name them."""
        groups = self._saved_groups()
        if not isinstance(groups, list) or not all(isinstance(group, Mapping) and PARAMS in group for group in groups):
            return None
        names = [list(group[PARAMS]) for group in groups]
        return names if all(isinstance(name, str) for group in names for name in group) else None

    @property
    def has_own_state(self) -> bool:
        """Whether the state is still in the checkpoint, for a load that reads it into the optimizer's memory."""
        if self.part is None or set(self) != set(self.part.keys) or not set(self.unread) >= set(self) - {GROUPS}:
            return False
        if GROUPS not in self or GROUPS in self.unread:
            return True
        numbers = iter(range(sum(map(len, self.names or ()))))
        saved = [[next(numbers) for _ in group] for group in self.names or ()]
        return [group.get(PARAMS) for group in self[GROUPS]] == saved

    def edited_groups(self) -> list[dict[str, Any]] | None:
        """Return the parameter groups under the parameters' names; None if nobody has asked for them."""
        if GROUPS not in self or GROUPS in self.unread:
            return None
        names = [name for group in self.names or () for name in group]
        groups: list[dict[str, Any]] = self[GROUPS]
        return [{**group, PARAMS: [names[number] for number in group[PARAMS]]} for group in groups]

    def _saved_groups(self) -> Any:
        if self._groups is None and self.part is not None and GROUPS in self.part.keys:
            self._groups = self.part.read([GROUPS])[GROUPS]
        return self._groups

    def _values(self, keys: list[str]) -> Mapping[str, Any]:
        names = self.names
        found = dict(super()._values([key for key in keys if key != GROUPS]))
        if GROUPS in keys:
            found[GROUPS] = copy.deepcopy(self._saved_groups())
        if names is None:
            return found
        numbers = {name: number for number, name in enumerate(name for group in names for name in group)}
        if GROUPS in found:
            for group in found[GROUPS]:
                group[PARAMS] = [numbers[name] for name in group[PARAMS]]
        if STATE in found:
            found[STATE] = {numbers.get(name, name): value for name, value in found[STATE].items()}
        return found
