"""The tables that a person reads."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from dcp_plugins.cli.bench import async_results
from dcp_plugins.cli.bench.async_results import AsyncResult
from dcp_plugins.cli.bench.measure import LIMIT
from dcp_plugins.cli.bench.results import MEASURES, CaseResult
from dcp_plugins.cli.bench.state_dict import MEASURES as STATE_DICT_MEASURES
from dcp_plugins.cli.bench.state_dict import StateDictResult
from dcp_plugins.cli.bench.targets import Verdict

__all__ = ["async_report", "case_report", "state_dict_report", "targets_report"]

_SHOWN_MS = 0.05
_ASYNC_MEASURES = {
    async_results.FIRST: "first save, blocked",
    async_results.BLOCKED: "later saves, blocked",
    async_results.DURABLE: "later saves, until durable",
}
_VERDICTS = {True: "met", False: "NOT MET", None: "-"}


def case_report(result: CaseResult) -> str:
    """Return the headline and the table of one case."""
    ranks = f" over {result.num_ranks} ranks" if result.num_ranks > 1 else ""
    size = f"{result.num_tensors:,} tensors, {result.num_bytes / 1e9:.3f} GB{ranks}"
    synced = "" if result.place.in_memory else ", synced" if result.sync else ", not synced"
    headline = f"{result.case}: {size}, in {result.place.path} ({result.place.fs_type}{synced})"
    table = _memory_table(result) if result.peak_bytes else _seconds_table(result)
    return "\n".join([headline, *("  " + line for line in _align(table)), ""])


def state_dict_report(result: StateDictResult) -> str:
    """Return the headline, the table of times, and the table of where ours go."""
    size = f"{result.num_parameters:,} parameters, {result.num_bytes / 1e9:.3f} GB with AdamW's state"
    headline = f"{result.case}: {size}, fully_shard over {result.num_ranks} ranks"
    rows = [["milliseconds: median (min-max)", "ours", "stock torch", "faster"]]
    for measure, sides in result.seconds.items():
        cells = [_spread([second * 1e3 for second in sides[side]], digits=1) for side in ("ours", "stock")]
        rows.append([STATE_DICT_MEASURES[measure], *cells, f"{result.speedup(measure):.2f}x"])
    split = [["where ours go, milliseconds", ""]]
    for measure, phases in result.phases.items():
        longest_first = sorted(phases.items(), key=lambda entry: -entry[1])
        shown = [f"{phase} {seconds * 1e3:.1f}" for phase, seconds in longest_first if seconds * 1e3 >= _SHOWN_MS]
        split.append([STATE_DICT_MEASURES[measure], ", ".join(shown)])
    return "\n".join([headline, *("  " + line for line in [*_align(rows), "", *_align(split, right=False)]), ""])


def async_report(result: AsyncResult) -> str:
    """Return the headline, the table of times, and what they are held against, of one state."""
    size = f"{result.num_tensors:,} tensors, {result.num_bytes / 1e9:.3f} GB"
    synced = "" if result.place.in_memory else ", synced" if result.sync else ", not synced"
    device = "" if result.device == "cpu" else f", on {result.device}"
    headline = f"{result.case}, {result.state}: {size}{device}, in {result.place.path} ({result.place.fs_type}{synced})"
    return "\n".join([headline, *("  " + line for line in [*_align(_async_table(result)), *_async_notes(result)]), ""])


def _async_table(result: AsyncResult) -> list[list[str]]:
    sides, rates = async_results.SIDES, result.step_rates
    rows = [["seconds: median (min-max)", *sides.values()]]
    for measure, label in _ASYNC_MEASURES.items():
        samples = result.seconds[measure]
        rows.append([label, *(_spread(samples[side]) if side in samples else "-" for side in sides)])
    rows.append(["blocked, of a plain copy", *(_times(result.blocked_per_copy(side)) for side in sides)])
    rows.append(
        ["durable, of a synchronous save and the copy", *(_times(result.durable_per_save(side)) for side in sides)]
    )
    steps = (_spread(rates[side], digits=2) if side in rates else "-" for side in sides)
    rows.append(["training meanwhile, of its own step rate", *steps])
    return rows


def _async_notes(result: AsyncResult) -> Iterator[str]:
    sides = async_results.SIDES

    def one(measure: str) -> str:
        return _spread(result.seconds[measure][measure])

    yield f"a plain copy of the same bytes {one(async_results.COPY)}, our synchronous save {one(async_results.SYNC)}"
    yield (
        f"overlapped staging of ours: the call returns in {one(async_results.RETURNED)}, "
        f"a step right behind it would wait {one(async_results.STEP_WAITS)}"
    )
    for side, staged_bytes in result.staged_bytes.items():
        yield f"kept for staging, {sides[side]}: {staged_bytes / 1e9:.3f} GB"
    for side, failure in result.failures.items():
        yield f"{sides[side]} failed: {failure}"
    for side, outcome in result.few_files.items():
        yield f"{sides[side]}, with {async_results.MAX_FILES} file descriptors: {outcome or 'saved'}"


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


def _spread(samples: Sequence[float], *, digits: int = 3) -> str:
    return f"{statistics.median(samples):.{digits}f} ({min(samples):.{digits}f}-{max(samples):.{digits}f})"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


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
