"""What the project promises of saves in the background, beside what a run measured."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence

from dcp_plugins.cli.bench import async_results
from dcp_plugins.cli.bench.async_results import (
    MAX_FILES,
    OURS_PROCESS,
    OURS_THREAD,
    RETURNED,
    STOCK_PROCESS,
    STOCK_THREAD,
    AsyncResult,
)
from dcp_plugins.cli.bench.verdict import Verdict

__all__ = ["judge_async"]

_OURS = {OURS_THREAD: STOCK_THREAD, OURS_PROCESS: STOCK_PROCESS}
_MAX_COPY_RATIO = 1.1
_MAX_DURABLE_RATIO = 1.2
_MAX_FIRST_RATIO = 0.5
_MAX_SMALL_RATIO = 0.1
_MIN_STEP_RATE = 0.9
_MAX_RETURN_SECONDS = {"big": 0.020, "small": 0.100}
# What is staged is padded: by a slot's alignment, and here by as much for the state's few scalars.
_MAX_STAGED_RATIO = 1.01


@dataclasses.dataclass(frozen=True, slots=True)
class _Promise:
    """An upper or a lower bound on one figure of one state."""

    states: tuple[str, ...]
    what: str
    bound: float
    required: str
    figure: Callable[[AsyncResult, str], float | None]
    """Of a side of ours."""
    unit: str = "x"
    is_lower: bool = False
    sides: tuple[str, ...] = tuple(_OURS)


def _step_rate(result: AsyncResult, side: str) -> float | None:
    rates = result.step_rates.get(side)
    return statistics.median(rates) if rates else None


def _staged_ratio(result: AsyncResult, side: str) -> float | None:
    staged = result.staged_bytes.get(side)
    return None if staged is None else staged / result.num_bytes


def _promises() -> Iterator[_Promise]:
    yield _Promise(
        ("big", "llm"),
        "later saves, blocked",
        _MAX_COPY_RATIO,
        f"at most {_MAX_COPY_RATIO:g}x a plain copy",
        lambda result, side: result.blocked_per_copy(side),
    )
    for state, bound in _MAX_RETURN_SECONDS.items():
        yield _Promise(
            (state,),
            "overlapped staging, the call returns",
            bound,
            f"in {bound * 1e3:.0f} ms",
            lambda result, _: result.median(RETURNED),
            unit=" s",
            sides=(OURS_THREAD,),
        )
    yield _Promise(
        async_results.ASYNC_STATES,
        "first save, blocked",
        _MAX_FIRST_RATIO,
        f"at most {_MAX_FIRST_RATIO:g}x stock",
        lambda result, side: result.first_per_stock(side, _OURS[side]),
    )
    yield _Promise(
        ("small",),
        "later saves, blocked",
        _MAX_SMALL_RATIO,
        f"at most {_MAX_SMALL_RATIO:g}x stock's thread at its defaults",
        lambda result, side: result.blocked_per_stock(side),
    )
    yield _Promise(
        ("big",),
        "until durable",
        _MAX_DURABLE_RATIO,
        f"at most {_MAX_DURABLE_RATIO:g}x our synchronous save and the copy",
        lambda result, side: result.durable_per_save(side),
    )
    yield _Promise(
        async_results.ASYNC_STATES,
        "training meanwhile",
        _MIN_STEP_RATE,
        f"at least {_MIN_STEP_RATE:g} of its own step rate",
        _step_rate,
        unit="",
        is_lower=True,
    )
    yield _Promise(
        async_results.ASYNC_STATES,
        "memory kept",
        _MAX_STAGED_RATIO,
        "one staged copy",
        _staged_ratio,
    )


def judge_async(results: Sequence[AsyncResult]) -> list[Verdict]:
    """Return a verdict for each promise, state, side of ours and place."""
    return [*_judge_figures(results), *_judge_few_files(results)]


def _judge_figures(results: Sequence[AsyncResult]) -> Iterator[Verdict]:
    for promise in _promises():
        for state in promise.states:
            matching = [result for result in results if result.state == state]
            for side in promise.sides:
                name = "" if len(promise.sides) == 1 else f", {async_results.SIDES[side].removeprefix('ours, ')}"
                what = f"async, {state}, {promise.what}{name}"
                if not matching:
                    yield Verdict(what, promise.required, "not measured", None)
                for result in matching:
                    yield _judge(promise, result, side, f"{what}, {result.place.fs_type}")


def _judge(promise: _Promise, result: AsyncResult, side: str, what: str) -> Verdict:
    figure = promise.figure(result, side)
    if figure is None:
        # Ours has no figures only where it failed, which keeps no promise; stock's failing makes comparing impossible.
        failed = side in result.failures
        return Verdict(what, promise.required, "failed" if failed else "stock failed", False if failed else None)
    is_met = figure >= promise.bound if promise.is_lower else figure <= promise.bound
    digits = 4 if promise.unit == " s" else 2
    return Verdict(what, promise.required, f"{figure:.{digits}f}{promise.unit}", is_met)


def _judge_few_files(results: Sequence[AsyncResult]) -> Iterator[Verdict]:
    what, required = "async, small, process runner", f"works with {MAX_FILES} file descriptors"
    matching = [result for result in results if result.few_files]
    if not matching:
        yield Verdict(what, required, "not measured", None)
    for result in matching:
        failure = result.few_files[OURS_PROCESS]
        yield Verdict(f"{what}, {result.place.fs_type}", required, failure or "works", failure is None)
