"""The seam: methods of `Trainer` that ask whether this Trainer has a `DCPCallback`, and do as before if it has none.

A callback is given neither the Trainer nor a say before the Trainer has written (``on_save``) or refused to read
(``_load_from_checkpoint``). So eleven methods are wrapped, once, on the class itself: subclasses that override one and
call ``super()``, as TRL's do, still arrive here. Their signatures, and those of what we call, are compared first.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer, __version__

from dcp_plugins.errors import MissingExtraError

__all__ = ["TESTED", "Replacement", "check", "install"]

TESTED = "transformers>=5.23,<6"

# What is replaced, with the parameters that it was written against.
REPLACED: dict[str, tuple[str, ...]] = {
    "train": ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    "_save_checkpoint": ("model", "trial"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_scaler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
    "_load_best_model": (),
    "_finalize_training": ("trial", "num_train_samples", "start_time"),
    "save_model": ("output_dir", "_internal_call"),
    "_save": ("output_dir", "state_dict"),
    "_save_optimizer_and_scheduler": ("output_dir",),
}
# What is called, or must go on calling what is replaced.
CALLED: dict[str, tuple[str, ...]] = {
    "_get_output_dir": ("trial",),
    "_maybe_log_save_evaluate": (
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
        "epoch",
        "ignore_keys_for_eval",
        "start_time",
        "learning_rate",
    ),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_save_rng_state": ("output_dir",),
    "_save_scaler": ("output_dir",),
    "create_optimizer": ("model",),
    "create_scheduler": ("num_training_steps", "optimizer"),
    "is_world_process_zero": (),
    "store_flos": (),
}


# What runs in the place of one method of a Trainer that has a `DCPCallback`. Called with the callback, the Trainer, the
# method that is replaced (bound to the Trainer) and its arguments.
Replacement = Callable[..., Any]

_lock = threading.Lock()
_MARK = "_dcp_plugins_replaces"


def check(trainer_class: type = Trainer) -> None:
    """Compare the signatures of everything that the seam touches with those it was written against.

    Raises:
        MissingExtraError: (an ImportError) This version of Transformers has moved the seam.
    """
    moved = []
    for name, expected in {**REPLACED, **CALLED}.items():
        method = getattr(trainer_class, name, None)
        found = None if method is None else tuple(inspect.signature(method).parameters)[1:]
        if found != expected:
            now = "is gone" if found is None else f"now takes ({', '.join(found)})"
            moved.append(f"Trainer.{name} {now}")
    if moved:
        raise MissingExtraError(
            f"dcp_plugins.transformers is tested with {TESTED}, and transformers {__version__} has moved what it builds"
            f" on: {'; '.join(moved)}. Install a tested version: pip install 'dcp_plugins[transformers]'"
        )


def install(
    replacements: Mapping[str, Replacement], callback_of: Callable[[Trainer], Any | None], trainer_class: type = Trainer
) -> None:
    """Wrap the methods, unless that has been done.

    Args:
        replacements: One for each of `REPLACED`.
        callback_of: Finds a Trainer's own callback, or None.
        trainer_class: The class whose methods are wrapped.
    """
    assert replacements.keys() == REPLACED.keys()
    with _lock:
        if hasattr(vars(trainer_class)["train"], _MARK):
            return
        check(trainer_class)
        for name, replacement in replacements.items():
            setattr(trainer_class, name, _dispatching(vars(trainer_class)[name], replacement, callback_of))


def _dispatching(
    stock: Callable[..., Any], ours: Replacement, callback_of: Callable[[Trainer], Any | None]
) -> Callable[..., Any]:
    @functools.wraps(stock)
    def method(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        callback = callback_of(self)
        if callback is None:
            return stock(self, *args, **kwargs)
        return ours(callback, self, functools.partial(stock, self), *args, **kwargs)

    setattr(method, _MARK, stock)
    return method
