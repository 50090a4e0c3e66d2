"""Staging that overlaps with training: what only an optimizer's step changes is copied while the next step is computed.

Between two steps of an optimizer nobody else changes the parameters that it trains or its state, which together are
nearly all of a checkpoint's bytes. They are copied on a thread. Everything else (buffers, averaged weights, numbers of
steps and epochs, random states) may change at any time: it is copied before ``stage`` returns.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dcp_plugins.errors import SnapshotChangedError, listing
from dcp_plugins.staging.kept_memory import KeptMemoryStager
from dcp_plugins.staging.memory import HostMemory
from dcp_plugins.staging.snapshot import take_snapshot
from dcp_plugins.staging.streams import Copies
from dcp_plugins.staging.wrappers import is_plain_memory, parts
from dcp_plugins.torch_private import ShardedTensor

__all__ = ["OverlappedStager"]

# What may change and is on a device is put aside there, in stream order, up to this much: the host waits for no kernel.
_MAX_ASIDE_BYTES = 64 * 1024 * 1024

_Storage = tuple[torch.device, int]


class OverlappedStager(KeptMemoryStager):
    """Stages what optimizers own in the background, and all the rest at once, into memory that is kept until ``close``.

    The caller has to see to it that no optimizer steps before the future that ``stage`` returns is done;
    ``dcp_plugins.engine.await_staging_before_step`` does. A value that is changed earlier, other than through
    ``tensor.data``, is found out: the future then raises, and so does the save. Later calls of ``stage`` copy these
    tensors before they return: code that has changed a tensor between two steps will probably do it again.

    Args:
        optimizers: Their parameters and their state are staged late. Those that are made of other kinds of tensors than
            plain ones, ``DTensor`` and ``ShardedTensor`` are not.
        changed_by_forward: Parameters that the forward pass changes: staged at once.
        use_shared_memory: Stage where another process can map it, for ``AsyncCheckpointerType.PROCESS``.
        watch_first: The first call of ``stage`` copies everything before it returns, and watches which tensors change
            before the next step. So a change that comes at every step fails no save. The caller has to call
            `note_changes` before that step.
    """

    def __init__(
        self,
        optimizers: Iterable[Optimizer],
        *,
        changed_by_forward: Iterable[torch.Tensor] = (),
        use_shared_memory: bool = False,
        watch_first: bool = False,
    ) -> None:
        self._optimizers = tuple(optimizers)
        self._changed_by_forward = tuple(changed_by_forward)
        self._is_first = watch_first
        # Storages by address, because the tensors of a state dict are short-lived aliases. If another tensor gets the
        # address of a freed one, it is copied early: this costs time, but does no harm.
        self._changed_early: set[_Storage] = set()
        self._watched: list[tuple[torch.Tensor, int]] = []
        super().__init__(
            HostMemory(pinned=torch.cuda.is_available(), shared=use_shared_memory),
            Copies(non_blocking=torch.accelerator.is_available()),
        )

    def stage(self, state_dict: dict[str, Any]) -> Future[dict[str, Any]]:
        """Return the future of a snapshot, valid until the next ``stage``, which writes into the same memory.

        Raises:
            UnsupportedValueError: A value cannot be copied.
        """
        self._require_open()
        if self._last is not None:
            concurrent.futures.wait([self._last])
        self._watched = []
        storages = self._storages_of_optimizers() - self._changed_early
        late = _Late(frozenset() if self._is_first else storages, self._copies)
        try:
            staged = take_snapshot(state_dict, self._memory, late.copy_the_rest, self._copies.wait)
        finally:
            # Without this wait, training could change values whose copies have only been started.
            self._copies.wait()
        if self._is_first:
            self._is_first = False
            self._watched = [(one, one._version) for one in late.copied_now if _storage(one) in storages]
        self._last = self._own_thread().submit(late.finish, staged, self._changed_early)
        return self._last

    def note_changes(self) -> None:
        """Note which of the watched tensors were changed since ``stage``: to be called before an optimizer steps."""
        watched, self._watched = self._watched, []
        self._changed_early.update(_storage(one) for one, version in watched if one._version != version)

    def close(self) -> None:
        self._watched = []
        super().close()

    def _storages_of_optimizers(self) -> set[_Storage]:
        found: set[_Storage] = set()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                found.update(_storages(group["params"]))
            found.update(_storages(optimizer.state))
        return found - set(_storages(self._changed_by_forward))


class _Copy(NamedTuple):
    target: torch.Tensor
    source: torch.Tensor
    version: int | None
    """How often the source had been changed when it was staged; None for a copy that was put aside."""


class _Late:
    """The copies of one snapshot that are made after ``stage`` has returned."""

    def __init__(self, storages: AbstractSet[_Storage], copies: Copies) -> None:
        self._storages = storages
        self._copies = copies
        self._waiting: list[_Copy] = []
        self.copied_now: list[torch.Tensor] = []
        """The tensors that were copied before ``stage`` returned and whose changes torch counts."""

    def copy_the_rest(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        """Start the copies that cannot wait, and note the others."""
        now: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        room_bytes = _MAX_ASIDE_BYTES
        for target, source in zip(targets, sources, strict=True):
            if not source.is_inference() and _storage(source) in self._storages:
                self._waiting.append(_Copy(target, source, source._version))
                continue
            if not source.is_inference():
                self.copied_now.append(source)
            if not source.is_cpu and source.nbytes <= room_bytes:
                try:
                    self._waiting.append(_Copy(target, source.detach().clone(), None))
                except torch.OutOfMemoryError:
                    # The training has filled the device: the host waits for the kernels then.
                    room_bytes = 0
                else:
                    room_bytes -= source.nbytes
                    continue
            now[0].append(target)
            now[1].append(source)
        # After the clones, so that their copies wait for them.
        self._copies.mark()
        self._copies.start(*now)

    def finish(self, staged: dict[str, Any], changed_early: set[_Storage]) -> dict[str, Any]:
        """Make the copies that were noted; on the stager's thread.

        Args:
            staged: The snapshot.
            changed_early: The storages of tensors that were changed before their copy are added to this set.
        """
        try:
            self._copies.start([copy.target for copy in self._waiting], [copy.source for copy in self._waiting])
        finally:
            self._copies.wait()
        changed = [copy.source for copy in self._waiting if copy.version not in (None, copy.source._version)]
        self._waiting = []
        if changed:
            changed_early.update(map(_storage, changed))
            raise SnapshotChangedError(
                f"{len(changed)} tensors of the optimizers (parameters or their state) were changed between the save"
                f" and the optimizer's next step, with shapes {listing({tuple(tensor.shape) for tensor in changed})}:"
                " their snapshot is not that of the step that was saved. Change them in the optimizer's step only, or"
                " save without overlap, with a stager that has copied everything when it returns"
            )
        return staged


def _storages(value: Any) -> Iterator[_Storage]:
    """Yield where the tensors of nested containers are, as far as they are plain memory or shards of it."""
    for leaf in _leaves(value):
        if leaf.numel():
            yield _storage(leaf)


def _storage(tensor: torch.Tensor) -> _Storage:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _leaves(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if is_plain_memory(value):
            yield value
        elif isinstance(value, (DTensor, ShardedTensor)):
            for _, part in parts(value):
                yield from _leaves(part)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
