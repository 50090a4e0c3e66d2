"""Figures, targets and tables made of samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcp_plugins.cli.bench.async_results import AsyncResult
from dcp_plugins.cli.bench.async_targets import judge_async
from dcp_plugins.cli.bench.places import Place, choose, describe
from dcp_plugins.cli.bench.processes import WorkerError, run_workers
from dcp_plugins.cli.bench.report import async_report, case_report, state_dict_report, targets_report
from dcp_plugins.cli.bench.results import CaseResult
from dcp_plugins.cli.bench.state_dict import MEASURES as STATE_DICT_MEASURES
from dcp_plugins.cli.bench.state_dict import StateDictResult
from dcp_plugins.cli.bench.targets import TARGETS, judge

TMPFS, EXT4 = Place(Path("/dev/shm"), "tmpfs"), Place(Path("/data"), "ext4")


def timed(case="big", place=TMPFS, ours=(1.0, 2.0, 3.0), stock=(4.0, 8.0, 15.0), limit=(0.9, 1.8, 3.0)):
    sides = {"ours": list(ours), "stock": list(stock), "limit": list(limit)}
    return CaseResult(
        case=case,
        place=place,
        sync=True,
        num_ranks=1,
        num_tensors=20_000 if case == "small" else 200,
        num_bytes=1_216_000_000,
        num_limit_threads=2,
        seconds={measure: dict(sides) for measure in ("first_save", "repeated_save", "load")},
    )


def memory(save=10_000_000, load=70_000_000):
    peaks = {"save": {"anonymous": 1000, "resident": save}, "load": {"anonymous": load, "resident": None}}
    sides = {direction: {"ours": peak, "stock": peak} for direction, peak in peaks.items()}
    return CaseResult(
        case="memory", place=TMPFS, sync=True, num_ranks=1, num_tensors=200, num_bytes=10**9, peak_bytes=sides
    )


def test_ratios_are_medians_of_the_ratios_within_rounds():
    result = timed()
    assert result.speedup("load") == pytest.approx(4.0)
    assert result.fraction_of_limit("load") == pytest.approx(0.9)
    assert timed("small").microseconds_per_tensor("load", "ours") == pytest.approx(100.0)


def test_every_target_gets_a_verdict_also_when_nothing_was_measured():
    verdicts = judge([])
    assert len(verdicts) == len(TARGETS) + 2 + len(STATE_DICT_MEASURES) + len(judge_async([]))
    assert all(verdict.is_met is None for verdict in verdicts)


def test_a_target_is_met_when_both_of_its_bounds_are():
    def verdict(result):
        (found,) = [one for one in judge([result]) if one.is_met is not None and "repeated save" in one.what]
        return found.is_met

    assert verdict(timed())
    assert not verdict(timed(stock=(2.0, 4.0, 6.0)))
    assert not verdict(timed(limit=(0.1, 0.2, 0.3)))
    # On disk less of stock's time can be saved, but more of the limit must be reached.
    assert not verdict(timed(place=EXT4))
    assert verdict(timed(place=EXT4, stock=(2.0, 4.0, 6.0), limit=(1.0, 2.0, 3.0)))


def test_warm_loads_are_judged_in_each_place():
    whats = [verdict.what for verdict in judge([timed(), timed(place=EXT4)]) if verdict.is_met is not None]
    assert [what for what in whats if "load" in what] == ["big, load, tmpfs", "big, load, ext4"]


def test_memory_is_judged_by_the_larger_reading():
    verdicts = {verdict.what: verdict.is_met for verdict in judge([memory()]) if verdict.is_met is not None}
    assert verdicts == {"memory, save, tmpfs": True, "memory, load, tmpfs": False}


def test_tables_line_up_and_say_what_matters():
    text = case_report(timed("small", EXT4))
    assert text.splitlines()[0] == "small: 20,000 tensors, 1.216 GB, in /data (ext4, synced)"
    assert "2.000 (1.000-3.000)" in text
    assert "4.00x" in text
    assert "limit, 2 threads" in text
    assert "100.0 us" in text
    assert len({len(line) for line in text.splitlines()[1:5]}) == 1
    assert "VmHWM" in case_report(memory())
    assert "NOT MET" in targets_report(judge([memory()]), scale=1)


def test_state_dict_calls_are_judged_and_their_time_is_split():
    result = StateDictResult(
        num_ranks=2,
        num_parameters=1000,
        num_bytes=10**8,
        seconds={
            "get_model": {"ours": [0.010, 0.020, 0.030], "stock": [0.030, 0.040, 0.300]},
            **{name: {"ours": [1.0], "stock": [1.5]} for name in STATE_DICT_MEASURES if name != "get_model"},
        },
        phases={"get_model": {"exchange": 0.002, "walk the model": 0.0125, "copy": 0.0}},
    )
    assert result.speedup("get_model") == pytest.approx(3.0)
    verdicts = {verdict.what: verdict.is_met for verdict in judge([result, timed()]) if "state-dict" in verdict.what}
    assert [what for what, is_met in verdicts.items() if is_met] == ["state-dict, get model"]
    assert not any(is_met for what, is_met in verdicts.items() if what != "state-dict, get model")
    text = state_dict_report(result)
    assert text.startswith("state-dict: 1,000 parameters, 0.100 GB with AdamW's state, fully_shard over 2 ranks")
    assert "20.0 (10.0-30.0)" in text
    assert "3.00x" in text
    assert "walk the model 12.5, exchange 2.0\n" in text


def test_the_file_system_of_a_place_is_found(tmp_path):
    place = describe(tmp_path)
    assert place.path == tmp_path.resolve()
    if Path("/proc/self/mountinfo").exists():
        assert place.fs_type != "unknown"
        assert describe(Path("/proc")).fs_type == "proc"


def test_a_given_path_is_the_only_place(tmp_path):
    assert [place.path for place in choose(tmp_path, None)] == [tmp_path.resolve()]


@pytest.mark.usefixtures("forked_workers")
def test_a_rank_that_fails_is_named_and_ends_the_others(capfd):
    with pytest.raises(WorkerError, match="rank [01] ended with code 1") as raised:
        run_workers("no such task", {}, num_ranks=2)
    assert "no such task" in raised.value.message + capfd.readouterr().err


def asynchronous(state="big", **changed):
    ours, stock = ("ours_thread", "ours_process"), ("stock_thread", "stock_process")
    values = {
        "first_blocked": {side: [0.4, 0.4] for side in ours} | {side: [1.0, 1.0] for side in stock},
        "blocked": {side: [0.105, 0.105] for side in ours} | {side: [0.2, 0.2] for side in stock},
        "durable": {side: [0.6, 0.6] for side in ours} | {side: [2.0, 2.0] for side in stock},
        "copy": {"copy": [0.1, 0.1]},
        "sync": {"sync": [0.5, 0.5]},
        "overlapped_returned": {"overlapped_returned": [0.003, 0.003]},
        "overlapped_step_waits": {"overlapped_step_waits": [0.1, 0.1]},
    }
    fields = {
        "num_tensors": 200,
        "num_bytes": 1000,
        "seconds": values,
        "step_rates": {"ours_thread": [0.95, 0.93], "ours_process": [0.97, 0.99], "stock_thread": [0.5, 0.5]},
        "staged_bytes": dict.fromkeys(ours, 1000),
        "failures": {"stock_process": "OSError: [Errno 24] Too many open files"},
    }
    return AsyncResult(state=state, place=Place(Path("/dev/shm"), "tmpfs"), sync=True, **{**fields, **changed})


def async_verdicts(result):
    return {verdict.what.removeprefix(f"async, {result.state}, "): verdict for verdict in judge_async([result])}


def test_saves_in_the_background_are_judged_by_what_they_are_held_against():
    verdicts = async_verdicts(asynchronous())
    assert verdicts["later saves, blocked, thread, tmpfs"].measured == "1.05x"
    for what in (
        "later saves, blocked, thread",
        "first save, blocked, process",
        "until durable, process",
        "training meanwhile, thread",
        "memory kept, thread",
    ):
        assert verdicts[f"{what}, tmpfs"].is_met, what
    assert verdicts["overlapped staging, the call returns, tmpfs"].is_met
    slow = asynchronous(step_rates={"ours_thread": [0.8, 0.85]}, staged_bytes={"ours_thread": 2000})
    for what, is_met in {"training meanwhile, thread": False, "memory kept, thread": False}.items():
        assert async_verdicts(slow)[f"{what}, tmpfs"].is_met is is_met


def test_a_side_of_ours_that_fails_keeps_no_promise_and_one_of_stocks_only_cannot_be_compared():
    result = asynchronous()
    seconds = {measure: dict(sides) for measure, sides in result.seconds.items()}
    for measure in ("first_blocked", "blocked", "durable"):
        seconds[measure].pop("ours_thread")
        seconds[measure].pop("stock_process")
    verdicts = async_verdicts(asynchronous(seconds=seconds, failures={"ours_thread": "x", "stock_process": "y"}))
    thread = verdicts["first save, blocked, thread, tmpfs"]
    assert (thread.measured, thread.is_met) == ("failed", False)
    process = verdicts["first save, blocked, process, tmpfs"]
    assert (process.measured, process.is_met) == ("stock failed", None)


def test_the_limit_on_descriptors_is_judged_by_our_process_alone():
    few_files = {"ours_process": None, "stock_process": "OSError: [Errno 24] Too many open files"}
    assert async_verdicts(asynchronous("small", few_files=few_files))["process runner, tmpfs"].is_met
    few_files["ours_process"] = "OSError"
    assert async_verdicts(asynchronous("small", few_files=few_files))["process runner, tmpfs"].is_met is False


def test_the_report_of_saves_in_the_background_shows_every_side_and_what_failed():
    text = async_report(asynchronous())
    assert text.startswith("async, big: 200 tensors, 0.000 GB, in /dev/shm (tmpfs)")
    assert "stock torch, process failed: OSError: [Errno 24] Too many open files" in text
    assert "a plain copy of the same bytes 0.100 (0.100-0.100), our synchronous save 0.500" in text
    assert [line.split("  ")[1] for line in text.splitlines()[2:8]] == [
        "first save, blocked",
        "later saves, blocked",
        "later saves, until durable",
        "blocked, of a plain copy",
        "durable, of a synchronous save and the copy",
        "training meanwhile, of its own step rate",
    ]
