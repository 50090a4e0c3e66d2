"""How checkpoints are saved: the options that every adapter takes, in code or from a file of its framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dcp_plugins.errors import listing

__all__ = ["Asynchronous", "SaveOptions", "check_amount", "check_choice", "check_count", "check_flag"]

Asynchronous = Literal["off", "thread", "process"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """How a `Saver` saves; checked when it is made.

    Raises:
        ValueError: A value is not one of those that are possible; names the field.
        TypeError: A value is of another type than its field.
    """

    asynchronous: Asynchronous = "off"
    """Whether training goes on while a checkpoint is written: "off" writes before the save returns, "thread" writes on
    a thread, "process" in a process of each rank's own, beside which training keeps the interpreter to itself."""
    thread_count: int | None = None
    """Number of I/O threads of each rank; None takes what the storage finds best."""
    sync_files: bool = True
    """Whether data and directory are synced before the commit. False is faster and survives a killed process, but not a
    loss of power."""
    overlap_staging: bool = True
    """For saves in the background: whether parameters and the optimizers' state are copied while the next step is
    computed, which waits for the copy before it changes them. False copies them before training goes on: for code that
    changes parameters elsewhere than in an optimizer's step."""

    def __post_init__(self) -> None:
        check_choice("asynchronous", self.asynchronous, get_args(Asynchronous))
        check_count("thread_count", self.thread_count)
        check_flag("sync_files", self.sync_files)
        check_flag("overlap_staging", self.overlap_staging)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], *, where: str) -> SaveOptions:
        """Make options of what a configuration says.

        Args:
            mapping: Names of fields and their values; those that are missing keep their defaults.
            where: The file and section it stands in, for messages.

        Raises:
            ValueError: A name is not a field's, or a value is impossible; says where.
            TypeError: A value is of the wrong type; says where.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in mapping if name not in names]
        if unknown:
            raise ValueError(f"{where}: unknown option(s) {listing(unknown)}. Valid names: {', '.join(sorted(names))}")
        try:
            return cls(**mapping)
        except (TypeError, ValueError) as exc:
            raise type(exc)(f"{where}: {exc}") from exc


def check_flag(name: str, value: object) -> None:
    """Raise ``TypeError`` unless an option is true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")


def check_choice(name: str, value: object, possible: Sequence[str]) -> None:
    """Raise ``ValueError`` unless an option is one of those that are possible."""
    if value not in possible:
        raise ValueError(f"{name} must be one of {listing(possible)}, got {value!r}")


def check_count(name: str, value: object, *, or_none: bool = True) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless an option is a whole number of at least 1, or None if it may be."""
    if value is None and or_none:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a number{' or None' if or_none else ''}, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1{', or None' if or_none else ''}, got {value}")


def check_amount(name: str, value: object) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless an option is a number of more than 0, or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or None, got {value!r}")
    if not value > 0:
        raise ValueError(f"{name} must be more than 0, or None, got {value}")
