"""The Trainer's own writers during a save of ours: ``save_model``, ``_save`` and ``_save_optimizer_and_scheduler``.

The save has the weights and the optimizer in its own data, so it does not need the Trainer's writers. Two things do:
``hf_weights``, and subclasses of `Trainer` that override a writer to add files. The overriding method is called as the
Trainer calls it. The method of `Trainer` that it calls in turn writes nothing, or the weights with ``hf_weights``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer

from dcp_plugins.manager.agreement import deciding_ranks
from dcp_plugins.state_dict import StateDictOptions, get_model_state_dict
from dcp_plugins.transformers.layout import has_weights
from dcp_plugins.transformers.unwrapped import model_of
from dcp_plugins.user_warnings import warn_user

__all__ = ["Writers"]

_HINT = " With DCPCallback(hf_weights=True) it finds the weights, the configuration and the tokenizer."


class Writers:
    """Calls the writers of one Trainer during a save, and takes the place of `Trainer`'s own versions of them."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._hf_weights = False
        self._warned_of: set[str] = set()

    def write(self, trainer: Trainer, path: Path, *, hf_weights: bool) -> None:
        """Write what belongs beside the data of a checkpoint that is about to be saved; every rank calls it.

        Args:
            trainer: The Trainer.
            path: The checkpoint's directory, which exists.
            hf_weights: Write what ``from_pretrained`` loads. Otherwise only overriding methods write.
        """
        self._path, self._hf_weights = path, hf_weights
        try:
            self._write_model(trainer, path)
            if not trainer.args.save_only_model:
                self._write_optimizer(trainer, path)
        finally:
            self._path = None

    def _write_model(self, trainer: Trainer, path: Path) -> None:
        own = _first_overridden(trainer, "save_model", "_save")
        write = partial(trainer.save_model, str(path), _internal_call=True)
        if self._hf_weights:
            deciding_ranks().settle("write weights for from_pretrained", write)
        elif own is not None:
            self._call(own, write, hint=_HINT)
            if trainer.is_world_process_zero() and has_weights(path):
                self._warn_once(
                    own,
                    "writes the weights itself, which the checkpoint has in its own data: each save writes them twice",
                )

    def _write_optimizer(self, trainer: Trainer, path: Path) -> None:
        own = _first_overridden(trainer, "_save_optimizer_and_scheduler")
        if own is not None:
            self._call(own, partial(trainer._save_optimizer_and_scheduler, str(path)))
        for name in ("_save_scaler", "_save_rng_state"):
            own = _first_overridden(trainer, name)
            if own is not None and trainer.is_world_process_zero():
                self._warn_once(own, "is not called: the checkpoints do not have what it writes")

    # These methods take the place of the Trainer's. Their arguments are those that `seam.Replacement` describes.

    def save_model(
        self,
        trainer: Trainer,
        original: Callable[..., Any],
        output_dir: str | None = None,
        _internal_call: bool = False,
    ) -> None:
        if not self._is_checkpoint(output_dir):
            original(output_dir, _internal_call)
        elif not trainer.is_fsdp_enabled:
            trainer._save(output_dir)
        elif self._hf_weights or _is_gathered_by_stock(trainer):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            trainer._save(output_dir, state_dict=get_model_state_dict(model_of(trainer), options=options))

    def save_weights(
        self,
        trainer: Trainer,
        original: Callable[..., Any],
        output_dir: str | None = None,
        state_dict: dict[str, Any] | None = None,
    ) -> None:
        if self._hf_weights or not self._is_checkpoint(output_dir):
            original(output_dir, state_dict)

    def save_optimizer_and_scheduler(self, trainer: Trainer, original: Callable[..., Any], output_dir: str) -> None:
        if not self._is_checkpoint(output_dir):
            original(output_dir)

    def _is_checkpoint(self, output_dir: str | None) -> bool:
        """Whether a writer is called for the checkpoint that is being saved."""
        return self._path is not None and output_dir is not None and Path(output_dir) == self._path

    def _call(self, own: str, write: Callable[[], None], hint: str = "") -> None:
        def call() -> None:
            try:
                write()
            except FileNotFoundError as exc:
                # The method needs a file that the stock Trainer would have written. Training goes on without it.
                self._warn_once(own, f"failed, and the checkpoints do not have what it writes: {exc}.{hint}")

        deciding_ranks().settle(f"call {own}", call)

    def _warn_once(self, own: str, what: str) -> None:
        if own not in self._warned_of:
            self._warned_of.add(own)
            warn_user(f"DCPCallback: {own} {what}")


def _first_overridden(trainer: Trainer, *names: str) -> str | None:
    """Return the full name of the first of these methods that the Trainer does not have from `Trainer`, if any."""
    for name in names:
        found = getattr(trainer, name)
        if found.__module__ != Trainer.__module__:
            return str(getattr(found, "__qualname__", name))
    return None


def _is_gathered_by_stock(trainer: Trainer) -> bool:
    """Whether the stock Trainer gathers the model under FSDP; otherwise the stock Trainer does not call ``_save``."""
    return "FULL_STATE_DICT" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
