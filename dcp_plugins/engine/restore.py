"""Restoring: a load for the owner of the checkpoint, driven by the checkpoint's keys and not by the state's."""

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
from dcp_plugins.plan.restore import Outline, Role
from dcp_plugins.templates import apply_completed, completion_of

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
    """Load a checkpoint into a state, in place, with every value that was saved below the state's root keys.

    Each object gets the state dict that it was saved with. The saved entries replace the entries of dicts and lists,
    which keep their identity. Tensors of the saved size are filled where they lie. Root keys of the checkpoint that the
    state does not have are not loaded.

    Args:
        state: The state that was saved, or some root keys of it. Every rank of the group passes its own.
        open_storage: Returns the reader of the checkpoint, reset; called once.
        process_group: The ranks that load; None takes the default group.
        no_dist: Load into this process alone.
        allow_partial_load: Leave values that the checkpoint lacks as they are, and saved values without a place unread.
        weights_only: Decode values as plain data, as for `DefaultLoadPlanner`.
        safe_globals: Classes that values may also have, as for `DefaultLoadPlanner`.

    Raises:
        CheckpointException: Some rank failed; raised on every rank: a key is missing, a saved value has no place in the
            state, a size differs, data is damaged.
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
        ranks.settle("apply", lambda: _put_back(state, plain), is_last=True)


def _outline_of(state: Mapping[Any, Any]) -> Outline:
    """Return the places of the objects in a state, before each is replaced by its state dict."""
    outline: dict[tuple[Any, ...], Role] = {}

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
    """Give the objects their loaded state dicts, and the caller's dicts and lists their loaded entries.

    Args:
        container: The caller's dict or list.
        plain: The loaded dict or list for it, with state dicts in the place of objects.
    """
    if completion_of(container) is not None:
        assert isinstance(container, dict)
        apply_completed(container, plain)
        return
    dropped: list[str] = []
    # In the order of a save: ``load_state_dict`` may run collectives, and ranks may have built their dicts differently.
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
        logger.warning("removed entries from the state that the checkpoint does not have: %s", listing(dropped))


# The kinds that a save records; it records a mapping of any other class as a dict.
_KINDS = frozenset({dict, OrderedDict, Counter, defaultdict})


def _replace_entries(own: Any, loaded: Any, name: str, dropped: list[str], *, is_callers: bool = False) -> bool:
    """Replace the entries of a dict or list, and of those in it, by the loaded ones; False if the kinds differ.

    Args:
        own: The value in the state; only a dict or list can get new entries.
        loaded: The loaded value for its place.
        name: The name of the place, for the log.
        dropped: The function adds the names of removed entries.
        is_callers: The caller holds ``own``: fill a mapping although the saved one was of another kind.
    """
    if own is loaded:
        return True
    if completion_of(own) is not None and isinstance(loaded, Mapping):
        apply_completed(own, loaded)
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
