"""What becomes of a promise when it is measured."""

from __future__ import annotations

import dataclasses

__all__ = ["Verdict"]


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """One line of the table of targets."""

    what: str
    required: str
    measured: str
    is_met: bool | None
    """None if the run did not measure it."""
