"""Completion of models' state dicts: a load reads extra state and lazy parameters too, or refuses what does not fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from dcp_plugins.errors import PlanError, listing
from dcp_plugins.format.memory import PLAIN_TENSORS
from dcp_plugins.state_dict.completion import plain_target
from dcp_plugins.state_dict.fit import keeps_sizes
from dcp_plugins.state_dict.keys import is_extra_state, keeps_keys, self_loading
from dcp_plugins.state_dict.names import Names
from dcp_plugins.templates import CompletingDict, Notes, SavedValue, like_saved, saved_values
from dcp_plugins.tensors.sharded import size_of
from dcp_plugins.torch_private import ShardedTensor

__all__ = ["model_template"]


def model_template(
    values: Mapping[str, Any], names: Names, *, strict: bool, hint: str, title: str = ""
) -> dict[str, Any]:
    """Return a model's state dict as a template that a load completes: extra state and lazy parameters are loaded too.

    Args:
        values: The state dict that the getter made, or a part of it.
        names: The names of the model's parameters.
        strict: Raise if the model's keys and the checkpoint's differ, before anything is read; otherwise load the keys
            that both have, and those of modules that load their part themselves.
        hint: The last sentence of that error: what the caller can do.
        title: The name of the model in that error, where there are several.
    """
    template = CompletingDict(values, _ModelCompletion(names, strict=strict, hint=hint, title=title))
    template.__dict__.update(vars(values) if isinstance(values, OrderedDict) else {})
    return template


class _ModelCompletion:
    """Completes the state dict of a model."""

    def __init__(self, names: Names, *, strict: bool, hint: str, title: str) -> None:
        self._names = names
        self._strict = strict
        self._hint = hint
        self._of = f" of {title}" if title else ""

    def completed(self, template: Mapping[Any, Any], saved: Mapping[Any, Any], notes: Notes) -> Mapping[Any, Any]:
        missing = [key for key in template if key not in saved and not is_extra_state(key)]
        unexpected = [key for key in saved if key not in template]
        problems = []
        # A module that loads its part itself gets the keys that it does not have now, as from ``load_state_dict``.
        free = self_loading(self._names, keeps_keys) if missing or unexpected else ()
        if self._strict and (missing or unexpected):
            for what, keys in (("Missing", missing), ("Unexpected", unexpected)):
                wrong = [key for key in keys if not key.startswith(free)]
                if wrong:
                    problems.append(f"{what} key(s){self._of}: {listing(wrong)}")
        tied = _earlier_tied(template, saved)
        made: OrderedDict[Any, Any] = OrderedDict()
        versions = getattr(template, "_metadata", None)
        if versions is not None:
            # The modules' versions: ``Module.load_state_dict`` reads this attribute.
            made._metadata = versions  # type: ignore[attr-defined]
        misfits: list[str] = []
        self_deciding = self_loading(self._names, keeps_sizes)
        for key, value in saved.items():
            if key in tied:
                # One memory under several names: as in ``load_state_dict``, the last one's value counts.
                notes.left_unread.update(found.fqn for found in saved_values(value))
            elif key in template:
                target_of = self._target_for(key, misfits, decides_itself=key.startswith(self_deciding))
                made[key] = like_saved(value, template[key], target_of)
            elif self._strict or key.startswith(free):
                made[key] = like_saved(value, None, plain_target)
            else:
                notes.left_unread.update(found.fqn for found in saved_values(value))
        problems += misfits
        if problems:
            raise PlanError(f"The model and the checkpoint do not fit: {'. '.join(problems)}. {self._hint}")
        return made

    def _target_for(
        self, key: str, misfits: list[str], *, decides_itself: bool
    ) -> Callable[[SavedValue, Any], torch.Tensor]:
        """Return a function that finds the tensor to fill: the model's own, unless the module decides what it takes.

        Such a module may skip a key or convert a value when it loads, so a read must not change its own tensors.
        """

        def target_of(saved: SavedValue, own: Any) -> torch.Tensor:
            if not isinstance(own, torch.Tensor) or is_lazy(own):
                return torch.empty(saved.size or (), dtype=saved.dtype)
            if size_of(own) == saved.size:
                if not decides_itself or isinstance(own, ShardedTensor) or is_extra_state(key):
                    return own
                return torch.empty_like(own.detach(), dtype=saved.dtype)
            may_differ = is_extra_state(key) or decides_itself
            is_scalar = own.dim() == 0 and saved.size is not None and len(saved.size) == 1
            if may_differ or is_scalar:
                return plain_target(saved, own)
            misfits.append(
                f"Size mismatch between saved {tuple(saved.size or ())} and current: {tuple(size_of(own))} for {key}"
            )
            return own

        return target_of


def _earlier_tied(template: Mapping[Any, Any], saved: Mapping[Any, Any]) -> set[Any]:
    """Return the names of a model's tensors whose memory has another name later on that was saved, too."""
    last: dict[tuple[int, torch.Size], Any] = {}
    earlier: set[Any] = set()
    for key, value in template.items():
        local = getattr(value, "_local_tensor", value)
        if key not in saved or type(local) not in PLAIN_TENSORS or local.is_meta or not local.numel():
            continue
        place = (local.data_ptr(), local.shape)
        if place in last:
            earlier.add(last[place])
        last[place] = key
    return earlier
