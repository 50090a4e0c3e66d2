"""Figures, targets and tables made of samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcp_plugins.cli.bench.places import Place, choose, describe
from dcp_plugins.cli.bench.processes import WorkerError, run_workers
from dcp_plugins.cli.bench.report import case_report, targets_report
from dcp_plugins.cli.bench.results import CaseResult
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
    assert len(verdicts) == len(TARGETS) + 2
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


def test_the_file_system_of_a_place_is_found(tmp_path):
    place = describe(tmp_path)
    assert place.path == tmp_path.resolve()
    if Path("/proc/self/mountinfo").exists():
        assert place.fs_type != "unknown"
        assert describe(Path("/proc")).fs_type == "proc"


def test_a_given_path_is_the_only_place(tmp_path):
    assert [place.path for place in choose(tmp_path, None)] == [tmp_path.resolve()]


def test_a_rank_that_fails_is_named_and_ends_the_others(capfd):
    with pytest.raises(WorkerError, match="rank [01] ended with code 1") as raised:
        run_workers("no such task", {}, num_ranks=2)
    assert "no such task" in raised.value.message + capfd.readouterr().err
