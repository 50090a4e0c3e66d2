"""What the campaigns against the package have in common: cases are chosen, counted, and reported where they fail."""

from __future__ import annotations

import contextlib
import random
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Campaign:
    """One run of a campaign: how much of it to run, and what it has found.

    Attributes:
        folder: An empty directory for whatever the campaign writes.
        share: The part of the cases that is run, from 0 to 1.
        seed: Chooses which cases they are. The same seed and share choose the same cases.
        match: Only kinds of saves whose names contain this text are tried.
        counts: How many cases were tried, by kind.
        violations: What broke a promise: the case, and what was seen.
    """

    folder: Path
    share: float = 1.0
    seed: int = 0
    match: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def pick(self, cases: Sequence[T]) -> list[T]:
        """Return this run's share of the cases, in their order: at least one of them, if there are any."""
        number = max(1, round(len(cases) * self.share))
        if number >= len(cases):
            return list(cases)
        return [cases[at] for at in sorted(self.random.sample(range(len(cases)), number))]

    def number(self, whole: int) -> int:
        """Return this run's share of a number of cases that are made at random: at least one."""
        return max(1, round(whole * self.share))

    @contextlib.contextmanager
    def case(self, kind: str, name: str) -> Iterator[None]:
        """Count one case. What is raised inside is a violation: promises are checked with ``assert``."""
        self.counts[kind] += 1
        try:
            yield
        except Exception:
            self.violations.append(f"{kind}, {name} (seed {self.seed}):\n{traceback.format_exc(limit=-12)}")
