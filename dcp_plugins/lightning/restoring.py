"""Restoring a module and its optimizers from a checkpoint that hooks may have edited.

Each rank reads the entries that no hook has touched, or its shards of them, from the files into the module's memory.
Entries that a hook has touched are taken from the checkpoint's dicts. If no entry is left to read, strategies that do
not shard call ``load_state_dict``, as stock's strategies do.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from dcp_plugins.coord import Ranks
from dcp_plugins.errors import PlanError, listing
from dcp_plugins.lightning.checkpoint_part import CheckpointPart
from dcp_plugins.lightning.lazy_state import LazyOptimizerState, LazyState
from dcp_plugins.lightning.load import Targets, fill_from_directory, fill_from_file, set_model, set_optimizer
from dcp_plugins.lightning.optimizer_state import consolidates
from dcp_plugins.manager import load_state, unwrapped_plan_errors
from dcp_plugins.manager.agreement import deciding_ranks
from dcp_plugins.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from dcp_plugins.state_dict.flatten import GROUPS, PARAMS
from dcp_plugins.state_dict.numbered import by_name
from dcp_plugins.state_dict.owned import own_model_state, own_optimizer_state

__all__ = ["Opened", "Restoring"]

_HINT = "Set strict_loading = False in the LightningModule"


class Opened:
    """The parts of a checkpoint that are still in its files.

    Args:
        checkpoint: The result of ``CheckpointIO.load_checkpoint``, before any hook has seen it.
    """

    def __init__(self, checkpoint: Mapping[str, Any]) -> None:
        model = checkpoint.get("state_dict")
        states = [one for one in checkpoint.get("optimizer_states", ()) if isinstance(one, LazyOptimizerState)]
        self.model: CheckpointPart | None = model.part if isinstance(model, LazyState) else None
        """The model's part; None for a file, or where a plugin has replaced the state dict."""
        self.optimizers = [state.part for state in states if state.part is not None]
        """The optimizers' parts."""
        # The references are weak: a dict that no hook keeps is freed after the restore.
        self._states = [weakref.ref(one) for one in (model, *states) if isinstance(one, LazyState)]

    def detach(self) -> None:
        """Read all values of the dicts that a hook has kept: from now on the run may delete the checkpoint."""
        for reference in self._states:
            state = reference()
            if state is not None:
                state.read_all()


@dataclass(frozen=True, slots=True)
class Restoring:
    """Restores a module and its optimizers. All ranks call its methods together."""

    opened: Opened
    """The parts that are read in place."""
    module: nn.Module
    """The LightningModule or what wraps it."""
    is_sharded: bool
    """Whether a rank has shards of the module: ``Module.load_state_dict`` cannot load whole tensors then."""
    no_dist: bool
    """Whether this process restores alone."""

    @property
    def _ranks(self) -> Ranks:
        return deciding_ranks(no_dist=self.no_dist)

    def restore_model(self, state: Mapping[str, Any], *, strict: bool) -> None:
        """Restore the module.

        Args:
            state: The checkpoint's ``state_dict``, as the hooks have left it.
            strict: Raise if the keys of the module and of ``state`` differ.
        """
        lazy = state if isinstance(state, LazyState) and state.part is self.opened.model else None
        part = self.opened.model
        if part is not None:
            has_unread = lazy is not None and bool(lazy.unread)
            found = self._ranks.all_gather("edits", lambda: (lazy is not None and lazy.is_untouched, has_unread))
            if all(is_untouched for is_untouched, _ in found):
                self._fill(part, strict=strict)
                return
            if any(has_unread for _, has_unread in found):
                self._restore_edited(part, state, lazy.unread if lazy is not None else (), strict=strict)
                return
        if self.is_sharded:
            fill_from_file({"": state}, Targets({"": self.module}, {}, hint=_HINT), strict=strict)
        else:
            self.module.load_state_dict(state, strict=strict)

    def _fill(self, part: CheckpointPart, *, strict: bool) -> None:
        fill_from_directory(
            part.reader,
            Targets({part.name: self.module}, {}, hint=_HINT),
            strict=strict,
            no_dist=self.no_dist,
            weights_only=part.weights_only,
            safe_globals=part.safe_globals,
            versions=part.versions,
        )

    def _restore_edited(
        self, part: CheckpointPart, state: Mapping[str, Any], unread: Iterable[str], *, strict: bool
    ) -> None:
        own = get_model_state_dict(self.module)
        in_place = {key: own[key] for key in unread if key in own}
        filled = own_model_state(self.module, options=StateDictOptions(strict=False), values=in_place, hint=f"{_HINT}.")
        self._load({part.name: filled}, part)
        given = OrderedDict((key, filled[key] if key in filled else state[key]) for key in state)
        if hasattr(state, "_metadata"):
            given._metadata = state._metadata  # type: ignore[attr-defined]
        if self.is_sharded:
            # Values from hooks are whole tensors: each rank first copies its shards of them into the module.
            whole = {key: given[key] for key in own if key in given and key not in filled}
            self._demand_alike(whole)
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_model_state_dict(self.module, whole, options=options)
            given.update({key: own[key] for key in whole})
        # This call compares the keys and runs the modules' load hooks. It does not copy a tensor onto itself.
        set_model(self.module, given, StateDictOptions(strict=strict), _HINT)

    def _demand_alike(self, edited: Mapping[str, Any]) -> None:
        """Raise on every rank if the hooks edited different entries on some ranks: all ranks have to load the same."""
        keys = self._ranks.all_gather("edits", lambda: sorted(edited))
        odd = {key for found in keys for key in set(found) ^ set(keys[0])}
        if odd:
            raise PlanError(
                f"The hooks of some ranks have read or edited entries of the checkpoint's state dict that those of rank"
                f" 0 have not, or the reverse: {listing(odd)}. Where the model is sharded, hooks have to do the same on"
                " every rank."
            )

    def _load(self, state: dict[str, Any], part: CheckpointPart) -> None:
        with unwrapped_plan_errors():
            load_state(
                state,
                storage_reader=part.reader,
                no_dist=self.no_dist,
                weights_only=part.weights_only,
                safe_globals=part.safe_globals,
            )

    def restore_optimizers(
        self, optimizers: Sequence[Optimizer], states: Sequence[Any], *, after_load: Callable[[Optimizer], None]
    ) -> None:
        """Restore the optimizers.

        Args:
            optimizers: The optimizers of the run.
            states: The checkpoint's ``optimizer_states``, as the hooks have left them.
            after_load: Called for each optimizer that was given its state by ``load_state_dict``.
        """
        self._compare_counts(len(optimizers), len(states))
        pairs = list(zip(optimizers, states, strict=False))
        fits = self._ranks.all_gather("optimizers", lambda: self._in_place(pairs)) if self.opened.optimizers else []
        in_place = set.intersection(*map(set, fits)) if fits else set()
        loaded: dict[str, Any] = {}
        for number in sorted(in_place):
            optimizer, state = pairs[number]
            loaded[state.part.name] = own_optimizer_state(self.module, optimizer)
        if loaded:
            self._load(loaded, self.opened.optimizers[0])
        for number, (optimizer, state) in enumerate(pairs):
            if number in in_place:
                filled = loaded[state.part.name]
                groups = state.edited_groups()
                if groups is not None:
                    filled[GROUPS] = groups
                set_optimizer(self.module, optimizer, filled)
                continue
            self._demand_same_groups(optimizer, state)
            if self.is_sharded:
                whole = by_name(state, self.module, optimizer)
                options = StateDictOptions(full_state_dict=True)
                set_optimizer(self.module, optimizer, whole, options=options)
            else:
                # A copy, because `Optimizer.load_state_dict` keeps the dict that it is given.
                optimizer.load_state_dict(dict(state))
                after_load(optimizer)

    def _compare_counts(self, num_own: int, num_saved: int) -> None:
        # A hook that wants the optimizers to begin anew leaves an empty list.
        if num_own == num_saved or not num_saved:
            return
        text = (
            f"configure_optimizers returned {num_own} optimizer(s), and the checkpoint has the state of {num_saved}:"
            " they are paired by their order"
        )
        if self.is_sharded and num_own > num_saved:
            raise PlanError(f"{text}, and some have none. Resume with the optimizers of the run that saved it.")
        left = f"the last {num_own - num_saved} begin anew" if num_own > num_saved else "the rest is not loaded"
        rank_zero_warn(f"{text}, and {left}.")

    def _in_place(self, pairs: Sequence[tuple[Optimizer, Any]]) -> list[int]:
        """Return which optimizers can be filled from the files: untouched by hooks, with the parameters of the save."""
        found: dict[str, int] = {}
        for number, (optimizer, state) in enumerate(pairs):
            part = state.part if isinstance(state, LazyOptimizerState) else None
            if part is None or part not in self.opened.optimizers or consolidates(optimizer):
                continue
            if part.name not in found and state.has_own_state and self._has_saved_names(optimizer, state):
                found[part.name] = number
        return list(found.values())

    def _has_saved_names(self, optimizer: Optimizer, state: LazyOptimizerState) -> bool:
        """Tell whether the names of an optimizer's parameters are those that were saved; not so in a renamed model."""
        own = self._own_names(optimizer)
        if own is None:
            return state.is_untouched
        saved = state.names
        return saved is not None and len(saved) == len(own) and _flat_set(saved) == _flat_set(own)

    def _own_names(self, optimizer: Optimizer) -> list[list[str]] | None:
        """Return the names of an optimizer's parameters, by group; None for a state dict of another form."""
        groups = own_optimizer_state(self.module, optimizer).get(GROUPS)
        return None if groups is None else [list(group[PARAMS]) for group in groups]

    def _demand_same_groups(self, optimizer: Optimizer, state: Any) -> None:
        """Check that the parameter groups are as many and as large as those that were saved.

        An optimizer with a ``load_state_dict`` of its own is not checked.

        Raises:
            PlanError: The groups differ. The error names their parameters.
        """
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict or GROUPS not in state:
            return
        own = self._own_names(optimizer)
        saved = [list(group[PARAMS]) for group in state[GROUPS]]
        if own is None or list(map(len, own)) == list(map(len, saved)):
            return
        named = (state.names if isinstance(state, LazyOptimizerState) else None) or saved
        raise PlanError(
            f"The parameter groups of {type(optimizer).__name__} are not those of the checkpoint. The optimizer has"
            f" {_described(own)}; the checkpoint has {_described(named)}. Make the optimizer as in the run that saved"
            " the checkpoint."
        )


def _flat_set(names: Sequence[Sequence[str]]) -> set[str]:
    return {name for group in names for name in group}


def _described(groups: Sequence[Sequence[Any]]) -> str:
    return f"{len(groups)} group(s): " + "; ".join(f"({listing(map(str, group))})" for group in groups[:6])
