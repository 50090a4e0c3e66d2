"""``StateDictOptions``: what a state dict holds, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StateDictOptions", "checked_options"]


@dataclass
class StateDictOptions:
    """Say what the getters return and how the setters load; field for field torch's ``StateDictOptions``.

    Attributes:
        full_state_dict: Getters return whole, plain tensors (a collective call on every rank of the model's meshes);
            setters expect whole tensors and take from each the part that this rank holds.
        cpu_offload: Getters return tensors on the CPU. With ``full_state_dict``, on global rank 0 only: the other ranks
            take part in the gathering and get ``{}``.
        ignore_frozen_params: Parameters that do not require a gradient are left out of what a getter returns, and are
            not called missing by a setter.
        keep_submodule_prefixes: Keep the path of a submodule in the keys when ``submodules`` is given. Deprecated, as
            ``submodules`` is.
        strict: Setters raise when keys are missing or unexpected; otherwise ``set_model_state_dict`` returns them.
        broadcast_from_rank0: Setters read the state dict given on global rank 0 only, and send it, one tensor at a
            time, to the others. Needs ``full_state_dict``; a collective call on every rank of the default group.
        flatten_optimizer_state_dict: Getters return optimizer state under ``state.<fqn>.<name>`` and
            ``param_groups.<fqn>.<option>`` instead of nested. Setters recognise both forms whatever this says.
        dsd_fqn_modifiers: Name of a method by which a module tells which of its children leave no trace in the keys of
            its ``state_dict()`` (it returns a dict; the values name the children).
    """

    full_state_dict: bool = False
    cpu_offload: bool = False
    ignore_frozen_params: bool = False
    keep_submodule_prefixes: bool = True
    strict: bool = True
    broadcast_from_rank0: bool = False
    flatten_optimizer_state_dict: bool = False
    dsd_fqn_modifiers: str = "_fqn_modifiers"


def checked_options(options: StateDictOptions | None) -> StateDictOptions:
    """Return the options, or the defaults for None.

    Checked here and not on construction: the class is mutable, and torch's own instances are welcome too.
    """
    if options is None:
        return StateDictOptions()
    if options.broadcast_from_rank0 and not options.full_state_dict:
        raise ValueError(
            "full_state_dict must be True when broadcast_from_rank0 is True: rank 0 sends whole tensors. Found "
            "broadcast_from_rank0=True and full_state_dict=False in StateDictOptions."
        )
    return options
