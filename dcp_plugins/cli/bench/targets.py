"""The speeds and the memory bound that the project promises, beside what a run measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from dcp_plugins.cli.bench.async_results import AsyncResult
from dcp_plugins.cli.bench.async_targets import judge_async
from dcp_plugins.cli.bench.measure import FIRST_SAVE, LOAD, SAVE
from dcp_plugins.cli.bench.results import MEASURES, CaseResult
from dcp_plugins.cli.bench.state_dict import MEASURES as STATE_DICT_MEASURES
from dcp_plugins.cli.bench.state_dict import StateDictResult
from dcp_plugins.cli.bench.verdict import Verdict

__all__ = ["TARGETS", "Verdict", "judge"]

_MEMORY_BOUND_BYTES = 64_000_000
# Of every getter and setter, on 1,000 parameters over 2 ranks.
_MIN_STATE_DICT_SPEEDUP = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A promise about one measure of one case, at scale 1 and with the default settings."""

    case: str
    in_memory: bool | None
    """On a file system in memory, on a disk, or (None) on either."""

    measure: str
    min_speedup: float
    """At least so many times faster than stock torch at its defaults."""

    min_fraction: float | None
    """At least this fraction of the limit's speed; None where only the cost per tensor is stated."""


TARGETS = (
    Target("big", True, SAVE, 3.5, 0.80),
    Target("big", False, SAVE, 2.0, 0.95),
    Target("big", None, LOAD, 2.5, 0.80),
    Target("llm", True, SAVE, 3.0, 0.75),
    Target("llm", True, LOAD, 3.0, 0.75),
    Target("small", True, FIRST_SAVE, 10.0, None),
    Target("small", True, SAVE, 25.0, None),
    Target("small", True, LOAD, 15.0, None),
    Target("fsdp2", True, SAVE, 1.8, 0.7),
    Target("fsdp2", True, LOAD, 1.8, 0.7),
)


def judge(results: Sequence[AsyncResult | CaseResult | StateDictResult]) -> list[Verdict]:
    """Return a verdict for every target: speeds, memory in both directions, state dict calls, background saves."""
    saved = [result for result in results if isinstance(result, CaseResult)]
    verdicts = [verdict for target in TARGETS for verdict in _judge_target(target, saved)]
    verdicts += [verdict for direction in ("save", "load") for verdict in _judge_memory(direction, saved)]
    measured = next((result for result in results if isinstance(result, StateDictResult)), None)
    verdicts += [_judge_state_dict(measure, measured) for measure in STATE_DICT_MEASURES]
    return verdicts + judge_async([result for result in results if isinstance(result, AsyncResult)])


def _judge_state_dict(measure: str, result: StateDictResult | None) -> Verdict:
    what, required = f"state-dict, {STATE_DICT_MEASURES[measure]}", f"{_MIN_STATE_DICT_SPEEDUP:g}x stock"
    if result is None:
        return Verdict(what, required, "not measured", None)
    speedup = result.speedup(measure)
    return Verdict(what, required, f"{speedup:.2f}x", speedup >= _MIN_STATE_DICT_SPEEDUP)


def _judge_target(target: Target, results: Sequence[CaseResult]) -> Iterator[Verdict]:
    kind = {True: "in memory", False: "on disk", None: "warm"}[target.in_memory]
    matching = [
        result
        for result in results
        if result.case == target.case and target.in_memory in (None, result.place.in_memory)
    ]
    required = f"{target.min_speedup:g}x stock"
    if target.min_fraction is not None:
        required += f", {target.min_fraction:.2f} of limit"
    what = f"{target.case}, {MEASURES[target.measure]}"
    if not matching:
        yield Verdict(f"{what}, {kind}", required, "not measured", None)
    for result in matching:
        speedup, fraction = result.speedup(target.measure), result.fraction_of_limit(target.measure)
        measured = f"{speedup:.2f}x"
        measured += (
            f", {fraction:.2f}"
            if target.min_fraction is not None
            else f", {result.microseconds_per_tensor(target.measure, 'ours'):.1f} us a tensor"
        )
        is_met = speedup >= target.min_speedup and fraction >= (target.min_fraction or 0.0)
        yield Verdict(f"{what}, {result.place.fs_type}", required, measured, is_met)


def _judge_memory(direction: str, results: Iterable[CaseResult]) -> Iterator[Verdict]:
    matching = [result for result in results if result.case == "memory"]
    required = f"at most {_MEMORY_BOUND_BYTES / 1e6:.0f} MB"
    if not matching:
        yield Verdict(f"memory, {direction}", required, "not measured", None)
    for result in matching:
        peak = result.worst_peak_bytes("ours", direction)
        what = f"memory, {direction}, {result.place.fs_type}"
        yield Verdict(what, required, f"{peak / 1e6:.1f} MB", peak <= _MEMORY_BOUND_BYTES)
