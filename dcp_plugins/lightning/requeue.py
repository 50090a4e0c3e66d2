"""SLURM's signal to requeue a job, answered between two steps by all ranks together.

Lightning saves right in the signal's handler. All ranks take part in our saves, and a rank that is signalled in the
midst of a step would wait for the others, which wait for it in the step's own collectives. So the signal is noted, and
Lightning's handler called before the next batch, once a rank has noted it. The checkpoint it saves
(``hpc_ckpt_<n>.ckpt``) is committed when it calls ``scontrol requeue``.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose

from dcp_plugins.lightning.paths import refuse_urls
from dcp_plugins.manager.agreement import deciding_ranks

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["Requeue", "is_requeue_checkpoint"]

_NAME = re.compile(r"hpc_ckpt_\d+\.ckpt")


class Requeue:
    """Stands in for Lightning's handler of the signal while a fit runs; Lightning puts back what was there before.

    Args:
        trainer: Under SLURM or not.
        no_dist: Whether the trainer is one process.
    """

    def __init__(self, trainer: Trainer, *, no_dist: bool) -> None:
        self._no_dist = no_dist
        self._noted = False
        self._signum: int | None = None
        self._answer: Callable[..., Any] | None = None
        environment = trainer._accelerator_connector.cluster_environment
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return
        # Lightning saves into this folder at the signal. A refusal at that time would leave the job no checkpoint.
        refuse_urls([trainer.default_root_dir])
        assert environment.requeue_signal is not None
        handler = signal.getsignal(environment.requeue_signal)
        # A handler of the user's own is left alone, by Lightning as well.
        if isinstance(handler, _HandlersCompose):
            self._signum, self._answer = environment.requeue_signal, handler
            signal.signal(environment.requeue_signal, self._note)

    def _note(self, signum: int, frame: Any) -> None:
        self._noted = True

    def answer_if_asked(self) -> None:
        """Save and requeue if a rank has been signalled. Called on every rank, before each batch."""
        if self._answer is None:
            return
        ranks = deciding_ranks(no_dist=self._no_dist)
        if any(ranks.all_gather("requeue", lambda: self._noted)):
            self._noted = False
            self._answer(self._signum, None)


def is_requeue_checkpoint(path: Path) -> bool:
    """Tell whether a checkpoint has the name of those that are saved before a job is requeued."""
    return _NAME.fullmatch(path.name) is not None
