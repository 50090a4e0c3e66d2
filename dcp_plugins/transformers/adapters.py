"""PEFT: a checkpoint of a model with adapters holds the adapters and what else is trained, not the frozen base."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers.utils.import_utils import is_peft_available

__all__ = ["has_adapters", "only_adapters"]

# What sharding, activation checkpointing and compilation put into the names of a module's parameters.
_WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def has_adapters(model: nn.Module) -> bool:
    """Whether a model, wrapped or not, is a ``PeftModel``."""
    return _peft_model(model) is not None


def only_adapters(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Choose from a model's state dict what a checkpoint holds: everything, or with PEFT what is not the frozen base.

    That is what PEFT itself would save of each adapter, active or not, and every parameter that is trained.
    """
    peft_model = _peft_model(model)
    if peft_model is None:
        return state
    from peft import get_peft_model_state_dict

    chosen = {_WRAPPERS.sub("", name) for name, value in peft_model.named_parameters() if value.requires_grad}
    names = {id(value): name for name, value in state.items()}
    for adapter in peft_model.peft_config:
        # It renames what it selects, so that the values have to say which these are.
        selected = get_peft_model_state_dict(
            peft_model, state_dict=dict(state), adapter_name=adapter, save_embedding_layers=False
        )
        chosen |= {names[id(value)] for value in selected.values() if id(value) in names}
    return {name: value for name, value in state.items() if name in chosen}


def _peft_model(model: nn.Module) -> Any | None:
    if not is_peft_available():
        return None
    from peft import PeftModel

    return next((module for module in model.modules() if isinstance(module, PeftModel)), None)
