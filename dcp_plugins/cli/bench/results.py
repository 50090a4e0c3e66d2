"""What a benchmark run found, the figures made of it, and its record in JSON."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from dcp_plugins.cli.bench.measure import FIRST_SAVE, LIMIT, LOAD, SAVE, Samples
from dcp_plugins.cli.bench.memory import PeakBytes
from dcp_plugins.cli.bench.options import Options
from dcp_plugins.cli.bench.places import Place, available_memory_bytes

__all__ = ["MEASURES", "SCHEMA", "CaseResult", "Reportable", "median_ratio", "record"]

SCHEMA = "dcp-plugins-bench/1"
MEASURES = {FIRST_SAVE: "first save", SAVE: "repeated save", LOAD: "load"}

_OURS, _STOCK = "ours", "stock"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """All that was measured of one case in one place."""

    case: str
    place: Place
    sync: bool
    num_ranks: int
    num_tensors: int
    num_bytes: int
    """Bytes of the whole state dict's tensors, over all ranks."""

    num_limit_threads: int | None = None
    """Threads per rank of the limit; None for ``memory``, which has none."""

    seconds: Samples = dataclasses.field(default_factory=dict)
    """Empty for ``memory``."""

    peak_bytes: PeakBytes = dataclasses.field(default_factory=dict)
    """Only for ``memory``."""

    def speedup(self, measure: str) -> float:
        """Return how many times faster than stock we are: the median over the rounds."""
        return median_ratio(self.seconds[measure][_STOCK], self.seconds[measure][_OURS])

    def fraction_of_limit(self, measure: str) -> float:
        """Return our speed as a fraction of the limit's: the median over the rounds."""
        return median_ratio(self.seconds[measure][LIMIT], self.seconds[measure][_OURS])

    def microseconds_per_tensor(self, measure: str, side: str) -> float:
        return statistics.median(self.seconds[measure][side]) / self.num_tensors * 1e6

    def worst_peak_bytes(self, side: str, direction: str) -> int:
        """Return the larger of the readings, the stricter judge of a bound."""
        return max(value for value in self.peak_bytes[direction][side].values() if value is not None)

    def to_json(self) -> dict[str, Any]:
        summary = {
            measure: {
                "median_seconds": {side: statistics.median(samples) for side, samples in sides.items()},
                "speedup_over_stock": self.speedup(measure),
                "fraction_of_limit": self.fraction_of_limit(measure),
                "microseconds_per_tensor": {side: self.microseconds_per_tensor(measure, side) for side in sides},
            }
            for measure, sides in self.seconds.items()
        }
        return {
            "case": self.case,
            "place": {"path": str(self.place.path), "fs_type": self.place.fs_type, "in_memory": self.place.in_memory},
            "sync": self.sync,
            "num_ranks": self.num_ranks,
            "num_tensors": self.num_tensors,
            "num_bytes": self.num_bytes,
            "num_limit_threads": self.num_limit_threads,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "summary": summary,
        }


class Reportable(Protocol):
    """What a case measured."""

    def to_json(self) -> dict[str, Any]: ...


def record(options: Options, results: Sequence[Reportable]) -> dict[str, Any]:
    """Return the whole run as JSON values, with what is needed to judge or repeat it."""
    try:
        version = importlib.metadata.version("dcp_plugins")
    except importlib.metadata.PackageNotFoundError:
        version = None
    return {
        "schema": SCHEMA,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"dcp_plugins": version, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "num_cpus": os.cpu_count(),
            "num_usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "available_memory_bytes": available_memory_bytes(),
        },
        "options": options.to_json(),
        "results": [result.to_json() for result in results],
    }


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios within each round: drift of the machine between rounds cancels."""
    return statistics.median(top / bottom for top, bottom in zip(numerators, denominators, strict=True))
