"""What was measured of saves in the background: the sides, the measures, and the figures made of them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from dcp_plugins.cli.bench.cases import ASYNC
from dcp_plugins.cli.bench.measure import Samples
from dcp_plugins.cli.bench.places import Place

__all__ = [
    "ASYNC_STATES",
    "BLOCKED",
    "COPY",
    "DURABLE",
    "FIRST",
    "MAX_FILES",
    "OURS_PROCESS",
    "OURS_THREAD",
    "RETURNED",
    "SIDES",
    "STEP_WAITS",
    "STOCK_PROCESS",
    "STOCK_THREAD",
    "SYNC",
    "AsyncResult",
]

ASYNC_STATES = ("big", "llm", "small")
MAX_FILES = 256

OURS_THREAD, STOCK_THREAD, OURS_PROCESS, STOCK_PROCESS = "ours_thread", "stock_thread", "ours_process", "stock_process"
SIDES = {
    OURS_THREAD: "ours, thread",
    STOCK_THREAD: "stock torch, thread",
    OURS_PROCESS: "ours, process",
    STOCK_PROCESS: "stock torch, process",
}

# Measures of every side.
FIRST, BLOCKED, DURABLE = "first_blocked", "blocked", "durable"
# What they are held against, and our overlapped staging; each has one side, called as the measure.
COPY, SYNC, RETURNED, STEP_WAITS = "copy", "sync", "overlapped_returned", "overlapped_step_waits"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AsyncResult:
    """What was measured of one state in one place."""

    state: str
    place: Place
    sync: bool
    num_tensors: int
    num_bytes: int

    device: str = "cpu"
    """Where the state is."""

    seconds: Samples
    """Measure -> side -> seconds, one per round."""

    step_rates: dict[str, list[float]]
    """Side -> steps per second of a training loop while it saves, as fractions of the loop's own."""

    staged_bytes: dict[str, int]
    """Side -> bytes that the API reports as kept; ours only."""

    failures: dict[str, str]
    """Side -> what it failed with, where it did; it then has no figures."""

    few_files: dict[str, str | None] = dataclasses.field(default_factory=dict)
    """Side -> what it failed with under a limit of ``MAX_FILES`` descriptors; None where it did not."""

    case: str = ASYNC

    def median(self, measure: str, side: str | None = None) -> float | None:
        """Return the median of the rounds; None if the side has none."""
        samples = self.seconds.get(measure, {}).get(side or measure)
        return statistics.median(samples) if samples else None

    def ratio(self, measure: str, side: str, reference: Callable[[int], float]) -> float | None:
        """Return the median over the rounds of a side's seconds over a reference's in the same round."""
        samples = self.seconds.get(measure, {}).get(side)
        if not samples:
            return None
        return statistics.median(sample / reference(number) for number, sample in enumerate(samples))

    def blocked_per_copy(self, side: str) -> float | None:
        return self.ratio(BLOCKED, side, lambda number: self.seconds[COPY][COPY][number])

    def durable_per_save(self, side: str) -> float | None:
        """Return the time until the checkpoint exists over that of a synchronous save and the copy."""
        return self.ratio(
            DURABLE, side, lambda number: self.seconds[SYNC][SYNC][number] + self.seconds[COPY][COPY][number]
        )

    def first_per_stock(self, side: str, stock: str) -> float | None:
        samples = self.seconds[FIRST].get(stock)
        return self.ratio(FIRST, side, lambda number: samples[number]) if samples else None

    def blocked_per_stock(self, side: str) -> float | None:
        """Return our blocking time over stock's on a thread, whose default is to take new memory for each save."""
        samples = self.seconds[FIRST].get(STOCK_THREAD)
        return self.ratio(BLOCKED, side, lambda number: samples[number]) if samples else None

    def to_json(self) -> dict[str, Any]:
        place = {"path": str(self.place.path), "fs_type": self.place.fs_type, "in_memory": self.place.in_memory}
        summary = {
            "median_seconds": {
                measure: {side: statistics.median(samples) for side, samples in sides.items()}
                for measure, sides in self.seconds.items()
            },
            "median_step_rates": {side: statistics.median(rates) for side, rates in self.step_rates.items()},
        }
        return {**dataclasses.asdict(self), "place": place, "summary": summary}
