"""Problems of an optimizer state dict, collected so that one error lists all; and the pairing of empty groups."""

from __future__ import annotations

import logging
from typing import Any

from torch.optim import Optimizer

from dcp_plugins.errors import PlanError, listing
from dcp_plugins.state_dict.flatten import PARAMS, ParsedOptimizerState
from dcp_plugins.state_dict.keys import suggestion
from dcp_plugins.state_dict.names import Names
from dcp_plugins.user_warnings import warn_user

__all__ = ["EmptyGroups", "Problems", "spellings"]

log = logging.getLogger(__name__)


def spellings(names: Names) -> dict[str, None]:
    """Return every name that a state dict may have for a parameter or buffer of the model."""
    hidden = {name: None for each in names.hidden_names.values() for name in each}
    return {**dict.fromkeys(names.tensors), **hidden}


_KEEPING_ADVICE = "To load what is there and keep the rest, pass StateDictOptions(strict=False)."
_GROUPS_ADVICE = (
    "To take each parameter's options where they are found, pass StateDictOptions(strict=False). Where ranks hold"
    " different parameters (pipeline stages), save with StateDictOptions(flatten_optimizer_state_dict=True)."
)


def _titled(params: list[str]) -> str:
    return f"{params[0]} and {len(params) - 1} more" if len(params) > 1 else listing(params) or "no parameter"


class Problems:
    """Collects everything that is wrong with a state dict, so that one error lists all."""

    def __init__(self, saved: ParsedOptimizerState, names: Names) -> None:
        self.missing: list[str] = []
        self.losing: list[str] = []
        self.ungrouped: list[str] = []
        self.others: list[str] = []
        self._is_about_groups = False
        self.kept: set[str] = set()
        self._unrecorded: list[str] = []
        self._saved = saved
        listed = {fqn for group in saved.groups for fqn in group.params}
        # The last part of a flat key is the name of a value or an option.
        foreign = {key.rpartition(".")[0] or key for key in saved.unknown}
        found = listed | foreign | {key for key in saved.state if isinstance(key, str)}
        # Names of the model are no candidates: each belongs to another parameter.
        self._candidates = sorted(found - set(spellings(names)))

    def compare_groups(self, optimizers: tuple[Optimizer, ...], names: Names) -> None:
        """Note whether the number of parameter groups has changed; a flat state dict does not say."""
        if self._saved.is_flat or not self._saved.groups:
            return
        own = [
            [fqn for parameter in group[PARAMS] for fqn in names.fqns(parameter)]
            for optimizer in optimizers
            for group in optimizer.param_groups
        ]
        if len(own) != len(self._saved.groups):
            theirs = "; ".join(_titled(group.params) for group in self._saved.groups[:6])
            ours = "; ".join(map(_titled, own[:6]))
            self.note_groups(
                f"Expected {len(own)} parameter group(s), as the optimizer has: {ours}. Found"
                f" {len(self._saved.groups)}: {theirs}. Group the parameters as they were when it was saved."
            )

    def lacks_state(self, fqn: str, *, has_own: bool) -> None:
        """Note a parameter that is in a saved group and has no saved state.

        Args:
            fqn: The name of the parameter.
            has_own: Whether the optimizer has state for it.
        """
        had_state = self._saved.had_state
        if has_own if had_state is None else fqn in had_state:
            self.losing.append(fqn)
        elif had_state is None:
            self._unrecorded.append(fqn)

    def note_class(self, mismatch: str | None) -> None:
        """Note that the state is of another class of optimizer; groups that say the same are noted once."""
        if mismatch is not None and mismatch not in self.others:
            self.others.append(mismatch)

    def note_groups(self, problem: str) -> None:
        """Note how the parameter groups differ from the saved ones."""
        self.others.append(problem)
        self._is_about_groups = True

    def report(self, *, may_warn: bool) -> None:
        """Log and warn of what was found and does not make the state dict unusable."""
        if self.kept:
            log.info("group options that the saved state lacks keep the optimizer's values: %s", listing(self.kept))
        if may_warn and self._unrecorded and self._saved.state:
            warn_user(
                f"The optimizer state dict has no state for {listing(self._unrecorded)}, and does not say whether there"
                " was any: these parameters begin without state. A state dict of get_optimizer_state_dict says it."
            )

    def raise_any(self) -> None:
        """Raise if anything was found that makes the state dict unusable.

        Raises:
            PlanError: Lists everything.
        """
        lines = []
        if self.missing:
            shown = [f'"{fqn}"{suggestion(fqn, self._candidates)}' for fqn in sorted(self.missing)[:12]]
            rest = len(self.missing) - len(shown)
            lines.append(
                f"Missing optimizer state for parameter(s) {', '.join(shown)}{f', ... ({rest} more)' if rest else ''}: "
                "in no parameter group of the state dict."
            )
        if self.losing:
            lines.append(
                f"Missing optimizer state for parameter(s) {listing(self.losing)}: the state dict has none, and the "
                "optimizer's own would be lost."
            )
        if self.ungrouped:
            lines.append(
                f"Parameter(s) {listing(self.ungrouped)} have state and are in no parameter group of the state dict. "
                "Where ranks hold different parameters (pipeline stages), the groups of one rank alone are saved: save "
                "with StateDictOptions(flatten_optimizer_state_dict=True)."
            )
        lines.extend(self.others[:12])
        if len(self.others) > 12:
            lines.append(f"... ({len(self.others) - 12} more)")
        if lines:
            advice = [_KEEPING_ADVICE] if self.missing or self.losing or self.ungrouped else []
            advice += [_GROUPS_ADVICE] if self._is_about_groups else []
            raise PlanError("\n    ".join(["The optimizer state dict does not fit:", *lines]), "\n    ".join(advice))


class EmptyGroups:
    """Pairs groups without parameters by their order: they have no names to pair them by."""

    def __init__(self, optimizers: tuple[Optimizer, ...], saved: ParsedOptimizerState) -> None:
        theirs = [group.options for group in saved.groups if not group.params]
        count = sum(not group[PARAMS] for optimizer in optimizers for group in optimizer.param_groups)
        # If their number has changed, the order says nothing, and each group keeps its own options.
        self._theirs = iter(theirs if len(theirs) == count else ())

    def next_options(self) -> dict[str, Any]:
        """Return the saved options of the next group without parameters."""
        return next(self._theirs, {})
