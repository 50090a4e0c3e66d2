"""``dcp-plugins bench`` from the outside, at tiny scales."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from dcp_plugins.cli import main
from dcp_plugins.cli.bench import async_results, command, memory, places, state_dict
from dcp_plugins.cli.bench.cases import ALL_CASE_NAMES
from dcp_plugins.cli.bench.options import Options
from dcp_plugins.cli.bench.processes import run_workers
from dcp_plugins.cli.bench.runners import make_stock
from dcp_plugins.cli.bench.state import local_tensors

# Without the flush before each synced save, which waits for whatever else the machine is writing.
TINY = ["--scale", "0.001", "--repeat", "2", "--no-sync"]
# Enough to see that the warm-up is not counted.
ONCE = ["--scale", "0.001", "--repeat", "1", "--no-sync"]
MEASURES = ["first_save", "repeated_save", "load"]


def run(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.mark.parametrize("case", ["big", "small"])
def test_a_case_reports_both_sides_and_the_limit(tmp_path, case):
    record_file = tmp_path / "record.json"
    place = tmp_path / "place"
    place.mkdir()
    result = run(case, "--path", place, "--json", record_file, *TINY)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{case}: ")
    assert [line.split("  ")[1].strip() for line in lines[2:5]] == ["first save", "repeated save", "load"]
    assert list(place.iterdir()) == []
    check_seconds(json.loads(record_file.read_text()), case, num_ranks=1)


@pytest.mark.usefixtures("forked_workers")
def test_the_fsdp2_case_measures_two_ranks(tmp_path):
    result = run("fsdp2", "--path", tmp_path, "--json", "-", *TINY)
    assert result.exit_code == 0, result.output
    found = check_seconds(json.loads(result.stdout), "fsdp2", num_ranks=2)
    assert found["num_tensors"] == 288
    assert "over 2 ranks" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("forked_workers")
def test_the_state_dict_case_times_both_sides_and_splits_ours(monkeypatch):
    monkeypatch.setattr(command, "choose", lambda *arguments: pytest.fail("a case that writes nothing chose a place"))
    result = run("state-dict", "--json", "-", "--targets", "--scale", "0.02", "--repeat", 2)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["results"]
    assert (found["case"], found["num_ranks"], found["num_parameters"]) == ("state-dict", 2, 20)
    assert list(found["seconds"]) == list(state_dict.MEASURES)
    for measure, sides in found["seconds"].items():
        assert {side: len(samples) for side, samples in sides.items()} == {"ours": 2, "stock": 2}
        assert found["summary"][measure]["speedup_over_stock"] > 0
        phases = found["phases"][measure]
        assert set(phases) == {*state_dict.PHASES.values(), state_dict.OTHER}
        assert all(seconds >= 0 for seconds in phases.values())
        assert phases["exchange"] > 0 if measure in ("get_full", "set_broadcast") else phases["exchange"] == 0
        assert phases["walk the model"] > 0
    report = result.stderr
    assert "state-dict: 20 parameters" in report
    assert "where ours go, milliseconds" in report
    assert sum("state-dict, " in line and "2x stock" in line for line in report.splitlines()) == len(found["seconds"])


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_the_async_case_times_both_runners_of_both_sides(tmp_path, monkeypatch):
    # The others are measured no differently.
    monkeypatch.setattr(async_results, "ASYNC_STATES", ("small",))
    place = tmp_path / "place"
    place.mkdir()
    result = run("async", "--path", place, "--json", "-", "--targets", *ONCE)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["results"]
    assert (found["case"], found["state"], found["num_tensors"]) == ("async", "small", 20)
    assert found["failures"] == {}
    for measure in (async_results.FIRST, async_results.BLOCKED, async_results.DURABLE):
        samples = found["seconds"][measure]
        assert {side: len(seconds) for side, seconds in samples.items()} == dict.fromkeys(async_results.SIDES, 1)
    for side in async_results.SIDES:
        assert found["seconds"]["durable"][side][0] >= found["seconds"]["blocked"][side][0] > 0
        assert found["step_rates"][side][0] > 0
    ours = (async_results.OURS_THREAD, async_results.OURS_PROCESS)
    assert found["staged_bytes"] == dict.fromkeys(ours, found["num_bytes"])
    assert all(found["seconds"][name][name][0] > 0 for name in ("copy", "sync", "overlapped_returned"))
    assert found["few_files"][async_results.OURS_PROCESS] is None
    assert "ours, process, with 256 file descriptors: saved" in result.stderr
    assert "async, big, until durable, thread" in result.stderr
    assert list(place.iterdir()) == []


def test_a_device_that_is_not_there_is_refused_by_name(tmp_path):
    result = run("async", "--path", tmp_path, "--device", "xpu:77", *ONCE)
    assert result.exit_code == 2
    assert "cannot use device 'xpu:77' here" in result.output


@pytest.mark.skipif(not memory.is_supported(), reason="reads /proc/self")
@pytest.mark.usefixtures("forked_workers")
def test_the_memory_case_reports_the_peaks_of_both_directions(tmp_path):
    result = run("memory", "--path", tmp_path, "--json", "-", "--targets", *TINY)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["results"]
    assert found["seconds"] == {}
    for direction in ("save", "load"):
        for side in ("ours", "stock"):
            peaks = found["peak_bytes"][direction][side]
            assert 0 <= peaks["anonymous"] < 1 << 30
            assert peaks["resident"] is None or 0 <= peaks["resident"] < 1 << 30
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not memory.is_supported(), reason="reads /proc/self")
def test_a_process_of_the_benchmark_is_a_python_of_its_own_that_leaves_its_answer(tmp_path):
    options = Options(
        num_rounds=1, scale=0.001, sync=False, num_threads=None, num_stock_threads=None, num_ranks=2
    ).to_json()
    arguments = {"options": options, "side": "ours", "direction": "save", "checkpoint": str(tmp_path / "c")}
    assert set(run_workers("memory", arguments)) == {"anonymous", "resident"}
    assert (tmp_path / "c" / ".metadata").exists()


def test_json_on_stdout_stands_alone(tmp_path):
    result = run("small", "--path", tmp_path, "--json", "-", "--targets", "--scale", "0.001", "--repeat", 1)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["schema"] == "dcp-plugins-bench/1"
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["num_cpus"] >= 1
    assert record["options"]["scale"] == 0.001
    assert record["options"]["sync"] is True
    assert "targets" in result.stderr


def test_targets_stand_beside_what_was_measured(tmp_path):
    result = run("small", "--path", tmp_path, "--targets", *TINY)
    assert result.exit_code == 0, result.output
    table = result.stdout[result.stdout.index("targets\n") :]
    assert "15x stock" in table
    assert "not measured" in table
    assert "this run's scale was 0.001" in table


def test_a_case_named_twice_runs_once(tmp_path):
    result = run("small", "small", "--path", tmp_path, "--json", "-", *TINY)
    assert len(json.loads(result.stdout)["results"]) == 1


def test_without_a_path_memory_and_disk_are_both_measured(tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    disk = tmp_path / "disk"
    shared.mkdir()
    disk.mkdir()
    monkeypatch.setattr(places, "_SHARED_MEMORY", shared)
    result = run("small", "--disk", disk, "--json", "-", *TINY)
    assert result.exit_code == 0, result.output
    assert [found["place"]["path"] for found in json.loads(result.stdout)["results"]] == [str(shared), str(disk)]


def test_threads_of_each_side_can_be_chosen(tmp_path):
    result = run("small", "--path", tmp_path, "--threads", 1, "--stock-threads", 2, "--json", "-", *TINY)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["results"]
    assert found["sync"] is False
    assert found["num_limit_threads"] == 1


def test_help_explains_every_case_on_a_line_of_its_own():
    lines = run("--help").stdout.splitlines()
    for case in ALL_CASE_NAMES:
        assert sum(line.split()[:1] == [case] for line in lines) == 1


class TestFailure:
    def test_an_unknown_case_lists_the_valid_ones(self):
        result = run("huge")
        assert result.exit_code == 2
        assert all(name in result.output for name in ALL_CASE_NAMES)

    @pytest.mark.parametrize("arguments", [["--scale", "0"], ["--repeat", "0"], ["--ranks", "1"], ["--threads", "0"]])
    def test_a_setting_out_of_range_is_refused(self, arguments):
        assert run("small", *arguments).exit_code == 2

    def test_a_directory_that_is_missing_is_refused(self, tmp_path):
        result = run("small", "--path", tmp_path / "missing")
        assert result.exit_code == 2
        assert "does not exist" in result.output

    def test_path_and_disk_together_are_refused(self, tmp_path):
        result = run("small", "--path", tmp_path, "--disk", tmp_path)
        assert result.exit_code == 2
        assert "--path and --disk" in result.output

    def test_too_little_space_is_refused_before_anything_is_built(self, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        monkeypatch.setattr(command, "_run", lambda *arguments: pytest.fail("a case ran"))
        result = run("small", "big", "--path", tmp_path)
        assert result.exit_code == 2
        assert "case 'small' needs" in result.output
        assert "--scale" in result.output

    def test_too_little_memory_is_refused_before_anything_is_built(self, tmp_path, monkeypatch):
        monkeypatch.setattr(places, "available_memory_bytes", lambda: 10**9)
        monkeypatch.setattr(command, "_run", lambda *arguments: pytest.fail("a case ran"))
        result = run("big", "--path", tmp_path)
        assert result.exit_code == 2
        assert "of memory (1.00 GB available)" in result.output

    @pytest.mark.parametrize("case", ["small", "llm"])
    def test_a_load_that_returns_other_bits_ends_the_run_with_the_names(self, tmp_path, monkeypatch, case):
        class Corrupting:
            name = "ours"
            caches_plans = True

            def __init__(self, options):
                self._stock = make_stock(options, no_dist=True)

            def forget(self):
                self._stock.forget()

            def save(self, state, path):
                self._stock.save(state, path)

            def load(self, state, path):
                self._stock.load(state, path)
                local_tensors(state)[0].view(-1).view(torch.uint8)[0] ^= 1

        monkeypatch.setattr(command, "make_ours", lambda options, no_dist: Corrupting(options))
        result = run(case, "--path", tmp_path, *TINY)
        assert result.exit_code == 1
        name = {"small": "blocks.0.experts.0.scale", "llm": "model.model.embed_tokens.weight"}[case]
        assert f"saved and loaded by ours: 1 value(s) are not what was saved: {name}" in result.output
        assert list(tmp_path.iterdir()) == []

    def test_a_record_that_cannot_be_written_is_an_error(self, tmp_path):
        result = run("small", "--path", tmp_path, "--json", tmp_path / "missing" / "record.json", *TINY)
        assert result.exit_code == 1
        assert "record.json" in result.output


def check_seconds(record, case, num_ranks):
    """Check one case's part of a record and return it."""
    (found,) = record["results"]
    assert found["case"] == case
    assert found["num_ranks"] == num_ranks
    assert found["num_tensors"] > 0
    assert found["num_bytes"] > 0
    assert list(found["seconds"]) == MEASURES
    for measure in MEASURES:
        for side in ("ours", "stock", "limit"):
            samples = found["seconds"][measure][side]
            assert len(samples) == 2
            assert all(0 < sample < 60 for sample in samples)
            assert found["summary"][measure]["median_seconds"][side] > 0
        assert found["summary"][measure]["speedup_over_stock"] > 0
        assert found["summary"][measure]["fraction_of_limit"] > 0
    return found
