"""Letting an optimizer's step wait for a snapshot, so that the forward and backward pass before it need not."""

from __future__ import annotations

import concurrent.futures
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from torch.optim import Optimizer

__all__ = ["await_staging_before_step"]


def await_staging_before_step(
    optimizers: Iterable[Optimizer],
    staging_completion: Future[Any],
    *,
    before_step: Callable[[], None] | None = None,
) -> None:
    """Make the next step of each optimizer wait until a snapshot is taken.

    For use with ``async_save`` and a stager that works in the background::

        stager = OverlappedStager([optimizer])
        response = dcp.async_save(state, checkpoint_id=path, async_stager=stager)
        await_staging_before_step([optimizer], response.staging_completion)

    A step that is given a closure runs it first, if the optimizer is one of torch's own: the closure, with the forward
    and backward pass in it, is run without waiting, and what it returns is handed on when the snapshot is taken. Other
    optimizers may change parameters before they call the closure, so they wait before the step.

    What staging failed with is not raised here, but by the save's future.

    Args:
        optimizers: The optimizers whose parameters or state are in the snapshot.
        staging_completion: This future is done when the snapshot is taken or has failed.
        before_step: Called when the snapshot is taken, before the next step of each optimizer.
    """
    for optimizer in optimizers:
        gate = _gates.get(optimizer)
        if gate is None:
            gate = _gates[optimizer] = _Gate()
            # For the optimizer's life: a hook cannot be removed while hooks are being called.
            optimizer.register_step_pre_hook(gate)
        gate.close_until(staging_completion, before_step)


class _Gate:
    """A hook before an optimizer's step that waits for futures, and forgets them when they are done."""

    def __init__(self) -> None:
        self._awaited: list[Future[Any]] = []
        self._before_step: list[Callable[[], None]] = []

    def close_until(self, future: Future[Any], before_step: Callable[[], None] | None) -> None:
        self._awaited = [*(one for one in self._awaited if not one.done()), future]
        if before_step is not None:
            self._before_step.append(before_step)

    def wait(self) -> None:
        concurrent.futures.wait(self._awaited)
        self._awaited = []
        calls, self._before_step = self._before_step, []
        for call in calls:
            call()

    def __call__(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._awaited:
            return None
        # The first argument is the optimizer.
        positional = len(args) > 1
        closure = args[1] if positional else kwargs.get("closure")
        if closure is None or not _runs_closure_first(optimizer):
            self.wait()
            return None
        opened = self._after(closure)
        return ((args[0], opened, *args[2:]), kwargs) if positional else (args, {**kwargs, "closure": opened})

    def _after(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def run_and_wait() -> Any:
            result = closure()
            self.wait()
            return result

        return run_and_wait


_gates: weakref.WeakKeyDictionary[Optimizer, _Gate] = weakref.WeakKeyDictionary()


def _runs_closure_first(optimizer: Optimizer) -> bool:
    return type(optimizer).step.__module__.startswith("torch.optim.")
