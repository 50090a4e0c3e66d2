"""Restoring: a load by the one who made the checkpoint, who gets back all that was saved, with its structure."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from typing import Any

import torch.distributed as dist

from dcp_plugins.collector import collector_paused
from dcp_plugins.contract import StorageReader
from dcp_plugins.engine.load import run_load
from dcp_plugins.engine.setup import holds_stateful, is_stateful, ranks_of, to_plain
from dcp_plugins.errors import listing
from dcp_plugins.events import record
from dcp_plugins.format.trust import SafeGlobal
from dcp_plugins.plan import RestoringLoadPlanner
from dcp_plugins.templates import completion_of, take_over

__all__ = ["restore"]

logger = logging.getLogger(__name__)


@collector_paused()
def restore(
    state: dict[str, Any],
    *,
    open_storage: Callable[[], StorageReader],
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    allow_partial_load: bool = False,
    weights_only: bool = True,
    safe_globals: Iterable[SafeGlobal] = (),
) -> None:
    """Load a checkpoint into a state, in place, driven by what was saved and not by what the state has now.

    An object gets the state dict that it was saved with. Of containers, the saved entries and kinds replace the present
    ones; those that the caller holds keep their identity. Tensors of the saved size are filled where they lie. Keys of
    the state's root choose what is loaded: others that were saved are left.

    Args:
        state: As it was given to the save, perhaps in part. Every rank of the group passes its own.
        open_storage: Returns the reader of the checkpoint, reset; called once.
        process_group: The ranks that load; None takes the default group.
        no_dist: Load into this process alone.
        allow_partial_load: Leave what the checkpoint lacks as it is, and what has no place in the state unread.
        weights_only: Read values as plain data.
        safe_globals: Classes that values may have all the same, as for `DefaultLoadPlanner`.

    Raises:
        CheckpointException: Some rank failed; raised on every rank: a key is missing, something that was saved has no
            place in the state, a size differs, data is damaged.
    """
    with record("load"):
        ranks = ranks_of(process_group, no_dist=no_dist, verb="load")
        planner = RestoringLoadPlanner(
            _outline_of(state),
            allow_partial_load=allow_partial_load,
            weights_only=weights_only,
            safe_globals=safe_globals,
        )
        plain = run_load(lambda: to_plain(state, keep_completing=True), open_storage, planner, ranks)
        ranks.settle("apply", lambda: _put_back(state, plain))


def _outline_of(state: Mapping[Any, Any]) -> dict[tuple[Any, ...], str]:
    outline: dict[tuple[Any, ...], str] = {}

    def visit(value: Any, path: tuple[Any, ...]) -> None:
        if is_stateful(value):
            outline[path] = "object"
        elif holds_stateful(value):
            outline[path] = "holder"
            for key, entry in enumerate(value) if isinstance(value, list) else value.items():
                visit(entry, (*path, key))

    for key, value in state.items():
        visit(value, (key,))
    return outline


def _put_back(container: MutableMapping[Any, Any] | list[Any], plain: Any) -> None:
    """Hand the loaded values over: to objects their state dicts, to the containers of the caller their entries."""
    if completion_of(container) is not None:
        assert isinstance(container, dict)
        take_over(container, plain)
        return
    dropped: list[str] = []
    # In the order of a save, in which ``state_dict`` may have run collectives.
    keys: Any = range(len(container)) if isinstance(container, list) else sorted(container, key=str)
    for key in keys:
        value, loaded = container[key], plain[key]
        if is_stateful(value):
            value.load_state_dict(loaded)
        elif holds_stateful(value):
            _put_back(value, loaded)
        elif not _replace_entries(value, loaded, str(key), dropped, is_callers=True):
            container[key] = loaded
    if isinstance(container, MutableMapping):
        # Values that were added to a container of objects after this one was made.
        container.update({key: value for key, value in plain.items() if key not in keys})
    if dropped:
        logger.warning("entries that the checkpoint does not have are gone from the state: %s", listing(dropped))


# Of a mapping of another class a save notes only that it is a mapping.
_KINDS = frozenset({dict, OrderedDict, Counter, defaultdict})


def _replace_entries(own: Any, loaded: Any, name: str, dropped: list[str], *, is_callers: bool = False) -> bool:
    """Give a container the loaded entries, keeping its identity and that of those in it; False if it cannot be done.

    Args:
        own: Anything; only a container can be kept.
        loaded: What was saved in its place.
        name: What to call it.
        dropped: Gets the names of entries that are gone.
        is_callers: The caller holds the container, which is kept although the saved one was of another kind.
    """
    if own is loaded:
        return True
    if completion_of(own) is not None and isinstance(loaded, Mapping):
        take_over(own, loaded)
        return True
    is_mapping = isinstance(own, MutableMapping) and isinstance(loaded, Mapping)
    if is_mapping and (is_callers or type(own) is type(loaded) or type(own) not in _KINDS):
        present: Any = dict(own)
        dropped += [f"{name}.{key}" for key in own if key not in loaded]
        own.clear()
        _fill(own, loaded.items(), present, name, dropped)
        return True
    if isinstance(own, list) and isinstance(loaded, list):
        present = dict(enumerate(own))
        own[:] = [None] * len(loaded)
        _fill(own, enumerate(loaded), present, name, dropped)
        return True
    return False


def _fill(own: Any, entries: Collection[Any] | Any, present: Mapping[Any, Any], name: str, dropped: list[str]) -> None:
    for key, value in entries:
        kept = present.get(key)
        own[key] = kept if _replace_entries(kept, value, f"{name}.{key}", dropped) else value
