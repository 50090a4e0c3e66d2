"""The keys of a model's state dict beside those that the model has."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from dcp_plugins.errors import PlanError, listing
from dcp_plugins.state_dict.names import Names
from dcp_plugins.state_dict.options import StateDictOptions
from dcp_plugins.torch_private import IncompatibleKeys

__all__ = ["check_keys", "is_extra_state", "judged", "keeps_keys", "self_loading", "suggestion", "title_of"]


# Batch norms load by themselves for one key's sake, a count that state dicts of their first version do not have.
_COMMON_LOADERS = (
    nn.Module.load_state_dict,
    nn.Module._load_from_state_dict,
    nn.modules.batchnorm._NormBase._load_from_state_dict,
)
_MADE_UP = "num_batches_tracked"


def check_keys(tree: Mapping[str, Any], names: Names, options: StateDictOptions) -> None:
    """Raise for keys that are missing or unexpected before anything is loaded, where strict options ask for it.

    Modules that load their part themselves, and extra state, are judged after the load, by what they say.

    Raises:
        PlanError: As ``judged``.
    """
    if not options.strict:
        return
    missing = [fqn for fqn in names.tensors if fqn not in tree and not fqn.endswith(_MADE_UP)]
    unexpected = [key for key in tree if key not in names.tensors and not is_extra_state(key)]
    if not missing and not unexpected:
        return
    free = self_loading(names, keeps_keys)
    missing = [fqn for fqn in missing if not fqn.startswith(free)]
    unexpected = [key for key in unexpected if not key.startswith(free)]
    judged(missing, unexpected, tree, names, options, outcome="Nothing has been loaded.")


def is_extra_state(fqn: str) -> bool:
    """Tell whether a key holds what a module's ``get_extra_state()`` returned: anything, in any size."""
    return fqn.rpartition(".")[2] == "_extra_state"


def self_loading(names: Names, is_common: Callable[[Any], bool]) -> tuple[str, ...]:
    """Return the prefixes of the keys that modules load in their own way, in the form that ``str.startswith`` takes.

    Args:
        names: The model's names.
        is_common: Tells whether a method or hook that takes part in loading does nothing out of the ordinary.
    """
    found = set()
    for path, part in names.parts.items():
        for name, module in part.named_modules(prefix=path, remove_duplicate=False):
            calls = [getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values()]
            calls.append(type(module)._load_from_state_dict)
            if module is part:
                calls.append(type(module).load_state_dict)
            if not all(is_common(call) for call in calls):
                at = names.canonical_paths.get(name, name)
                found.add(f"{at}." if at else "")
    return tuple(found)


def keeps_keys(call: Any) -> bool:
    """Tell whether a method or hook takes keys as they are; torch's wrappers leave no trace in canonical names."""
    return call in _COMMON_LOADERS or (getattr(call, "__module__", None) or "").startswith("torch.distributed.")


def title_of(names: Names) -> str:
    """Return what to call the model in errors."""
    return " and ".join(dict.fromkeys(type(part).__name__ for part in names.parts.values()))


def judged(
    missing: list[str],
    unexpected: list[str],
    tree: Mapping[str, Any],
    names: Names,
    options: StateDictOptions,
    *,
    outcome: str = "The rest has been loaded.",
) -> IncompatibleKeys:
    """Return what is missing and unexpected, or raise if the options are strict.

    Args:
        missing: Canonical names that the model has and the state dict has not.
        unexpected: The reverse.
        tree: The state dict.
        names: The model's names.
        options: ``strict`` and ``ignore_frozen_params`` apply.
        outcome: What to say has become of the rest.

    Raises:
        PlanError: (a RuntimeError) Names every key, and similar ones.
    """
    if options.ignore_frozen_params:
        missing = [fqn for fqn in missing if not names.is_frozen(fqn)]
    if missing:
        tied = names.tied(missing)
        missing = [fqn for fqn in missing if not any(name in tree for name in tied[fqn])]
    if options.strict and (missing or unexpected):
        lines = [f"Error(s) in loading state_dict for {title_of(names)}:"]
        if missing:
            lines.append(f"Missing key(s) in state_dict: {_described(missing, unexpected)}.")
        if unexpected:
            lines.append(f"Unexpected key(s) in state_dict: {_described(unexpected, ())}.")
        lines.append(outcome)
        advice = "To load what fits and be told the rest, pass StateDictOptions(strict=False)."
        raise PlanError("\n    ".join(lines), advice)
    return IncompatibleKeys(missing, unexpected)


def _described(keys: list[str], candidates: Iterable[str]) -> str:
    pool = list(candidates)
    # Suggestions cost a comparison with every candidate: only for the keys that are shown.
    shown = {key: f'"{key}"{suggestion(key, pool)}' for key in sorted(keys)[:12]}
    return listing(shown.get(key, key) for key in keys)


def suggestion(key: str, candidates: Iterable[str]) -> str:
    """Return " (did you mean ...?)" for the most similar of the candidates, or nothing."""
    pool = list(candidates)
    # The same name under another prefix is the usual case: a state dict of an inner or outer module.
    nested = [name for name in pool if name.endswith(f".{key}") or key.endswith(f".{name}")]
    close = nested or difflib.get_close_matches(key, pool, n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""
