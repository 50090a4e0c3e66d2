"""Every exception the package raises, in one tree.

Each also derives from what users of ``torch.distributed.checkpoint`` catch in its place::

    CheckpointError (Exception)
    |-- CheckpointException      (torch's CheckpointException)  some rank failed: which, and why
    |-- PlanError                (RuntimeError, ValueError)     state dict and checkpoint do not fit
    |-- UnsupportedValueError    (ValueError, TypeError)        a value that cannot be checkpointed
    |   `-- SnapshotChangedError                                ... because it was changed during the save
    |-- CorruptCheckpointError   (RuntimeError)                 bytes on storage are not what was written
    |   `-- UnsafeCheckpointError                               ... and loading them could do harm
    |-- CheckpointNotFoundError  (FileNotFoundError)            no committed checkpoint under this id
    |-- CheckpointExistsError    (RuntimeError)                 ``overwrite=False`` and the id is taken
    |-- StorageWriteError        (RuntimeError)                 storage took less than the plan says
    |-- StorageDetectionError    (RuntimeError)                 no storage claims this checkpoint id
    |-- StagingMemoryError       (MemoryError)                  no memory for a snapshot
    |-- LostContactError         (ConnectionError)              another rank died, or did not answer in time
    `-- MissingExtraError        (ImportError)                  an optional framework is not installed

Warnings::

    UnloadableValueWarning (UserWarning)    a value was saved that a load refuses by default
    UnreadValuesWarning (UserWarning)       a load left saved values unread below a container that it was given
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterable, Mapping

from dcp_plugins.contract import TorchCheckpointException

__all__ = [
    "CheckpointError",
    "CheckpointException",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "LostContactError",
    "MissingExtraError",
    "PlanError",
    "SnapshotChangedError",
    "StagingMemoryError",
    "StorageDetectionError",
    "StorageWriteError",
    "UnloadableValueWarning",
    "UnreadValuesWarning",
    "UnsafeCheckpointError",
    "UnsupportedValueError",
    "listing",
]

WrappedException = tuple[BaseException, traceback.StackSummary]


class CheckpointError(Exception):
    """The root of what this package raises."""


class CheckpointException(TorchCheckpointException, CheckpointError):
    """At least one rank failed during a save or a load; raised on every rank.

    ``failures`` maps each failing rank (rank in the save's process group) to its exception and the stack where it was
    raised. Caught by ``except torch.distributed.checkpoint.api.CheckpointException`` and by ``except Exception``
    (torch's own class derives from ``BaseException`` only).
    """

    def __init__(self, msg: str, failures: Mapping[int, WrappedException]) -> None:
        super().__init__(msg, dict(failures))
        self._step = msg

    def __str__(self) -> str:
        ranks = sorted(self.failures)
        lines = [f"{self._step}: {len(ranks)} rank(s) failed: {listing(ranks)}"]
        for rank in ranks[:_LISTED]:
            exc, stack = self.failures[rank]
            if isinstance(exc, OSError) and exc.filename is not None and exc.errno in _DISK_ERRORS:
                # The system's message names the file and the problem. A traceback of this package would add nothing.
                lines.append(f"[rank {rank}] {type(exc).__name__}: {exc}")
                continue
            lines.append(f"[rank {rank}] Traceback (most recent call last):")
            lines.extend(line.rstrip("\n") for line in (stack.format() if stack is not None else ()))
            lines.extend(line.rstrip("\n") for line in traceback.format_exception_only(type(exc), exc))
        if len(ranks) > _LISTED:
            lines.append(f"... and {len(ranks) - _LISTED} more ranks")
        return "\n".join(lines)


class PlanError(CheckpointError, RuntimeError, ValueError):
    """The state dict and the checkpoint do not fit together; lists every offending key.

    Args:
        problem: What does not fit.
        advice: What a caller of this package's own functions can do. Users of a framework cannot pass options of these
            functions, so an adapter puts other advice in its place, see `advised`.
    """

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(f"{problem}\n    {advice}" if advice else problem)
        self._problem = problem

    def advised(self, advice: str) -> PlanError:
        """Return the same error with other advice."""
        return PlanError(self._problem, advice)


class UnsupportedValueError(CheckpointError, ValueError, TypeError):
    """A value in the state dict is of a kind that cannot be saved or loaded."""


class SnapshotChangedError(UnsupportedValueError):
    """Values were changed while their snapshot was being taken. The save failed: it would have mixed two steps."""


class CorruptCheckpointError(CheckpointError, RuntimeError):
    """Stored bytes are not the bytes that a save wrote: truncated, overwritten, or with flipped bits."""


class UnsafeCheckpointError(CorruptCheckpointError):
    """The checkpoint asks for something that data must not do: import code, or leave its directory."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No committed checkpoint exists under the id."""


class CheckpointExistsError(CheckpointError, RuntimeError):
    """A committed checkpoint exists under the id and the writer was told not to overwrite."""


class StorageWriteError(CheckpointError, RuntimeError):
    """The storage accepted less, or other, data than the plan says."""


class StorageDetectionError(CheckpointError, RuntimeError):
    """No registered storage claims the checkpoint id."""


class StagingMemoryError(CheckpointError, MemoryError):
    """There is not the memory, or not the permission to use it, that a snapshot of the state dict takes."""


class LostContactError(CheckpointError, ConnectionError):
    """This rank could not talk to the others: one has died, or did not answer within the group's timeout."""


class MissingExtraError(CheckpointError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class UnreadValuesWarning(UserWarning):
    """A load left saved values unread that lie below a nested container of its state dict."""


class UnloadableValueWarning(UserWarning):
    """A value was saved that a load refuses by default, or of which the save does not keep everything.

    A load refuses a class that is neither one of plain data nor declared safe. A save does not keep the class of a
    dict or list that a restore makes anew, nor a key that cannot be pickled.
    """


_LISTED = 12
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})


def listing(items: Iterable[object]) -> str:
    """Render items, sorted, for an error message: a dozen at most, then the count of the rest."""
    values = sorted(items, key=lambda item: (str(type(item)), item))
    shown = ", ".join(str(value) for value in values[:_LISTED])
    return shown if len(values) <= _LISTED else f"{shown}, ... ({len(values) - _LISTED} more)"
