"""The tables that a person reads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from dcp_plugins.cli.bench.measure import LIMIT
from dcp_plugins.cli.bench.results import MEASURES, CaseResult
from dcp_plugins.cli.bench.targets import Verdict

__all__ = ["case_report", "targets_report"]

_VERDICTS = {True: "met", False: "NOT MET", None: "-"}


def case_report(result: CaseResult) -> str:
    """Return the headline and the table of one case."""
    ranks = f" over {result.num_ranks} ranks" if result.num_ranks > 1 else ""
    size = f"{result.num_tensors:,} tensors, {result.num_bytes / 1e9:.3f} GB{ranks}"
    synced = "" if result.place.in_memory else ", synced" if result.sync else ", not synced"
    headline = f"{result.case}: {size}, in {result.place.path} ({result.place.fs_type}{synced})"
    table = _memory_table(result) if result.peak_bytes else _seconds_table(result)
    return "\n".join([headline, *("  " + line for line in _align(table)), ""])


def targets_report(verdicts: Sequence[Verdict], *, scale: float) -> str:
    """Return the table of targets, each beside what was measured."""
    rows = [["target", "required", "measured", ""]]
    rows += [[verdict.what, verdict.required, verdict.measured, _VERDICTS[verdict.is_met]] for verdict in verdicts]
    note = [] if scale == 1 else [f"The targets are for --scale 1; this run's scale was {scale:g}."]
    return "\n".join(["targets", *("  " + line for line in _align(rows, right=False)), *note, ""])


def _seconds_table(result: CaseResult) -> list[list[str]]:
    threads = f"limit, {result.num_limit_threads} thread" + ("s" if result.num_limit_threads != 1 else "")
    rows = [["seconds: median (min-max)", "ours", "stock torch", "faster", threads, "of limit"]]
    many = result.num_tensors > 1000
    if many:
        rows[0] += ["ours/tensor", "stock/tensor"]
    for measure, sides in result.seconds.items():
        row = [
            MEASURES[measure],
            _spread(sides["ours"]),
            _spread(sides["stock"]),
            f"{result.speedup(measure):.2f}x",
            _spread(sides[LIMIT]),
            f"{result.fraction_of_limit(measure):.2f}",
        ]
        if many:
            row += [f"{result.microseconds_per_tensor(measure, side):.1f} us" for side in ("ours", "stock")]
        rows.append(row)
    return rows


def _memory_table(result: CaseResult) -> list[list[str]]:
    rows = [["peak beyond the state dict, MB", "ours", "stock torch"]]
    for direction, sides in result.peak_bytes.items():
        for reading, label in (("anonymous", "RssAnon, sampled"), ("resident", "VmHWM")):
            cells = [sides[side][reading] for side in ("ours", "stock")]
            rows.append([f"{direction}, {label}", *("-" if cell is None else f"{cell / 1e6:.1f}" for cell in cells)])
    return rows


def _spread(samples: Sequence[float]) -> str:
    return f"{statistics.median(samples):.3f} ({min(samples):.3f}-{max(samples):.3f})"


def _align(rows: Sequence[Sequence[str]], *, right: bool = True) -> list[str]:
    """Pad cells to columns: the first column to the left, the others to the right if they are figures."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if right and index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
