"""The order of turns, and what is inside the timed parts."""

from __future__ import annotations

import gc
import shutil

import pytest
import torch

from dcp_plugins.cli.bench.limits import Limit
from dcp_plugins.cli.bench.measure import Alone, measure
from dcp_plugins.cli.bench.state import VerificationError, blank_copy, local_tensors


class RecordingRunner:
    """Keeps "checkpoints" in memory and notes what is asked of it."""

    def __init__(self, name, log, caches_plans=True):
        self.name = name
        self.caches_plans = caches_plans
        self._log = log
        self.is_lossy = False
        self.collects = set()

    def forget(self):
        self._log.append((self.name, "forget"))

    def save(self, state, path):
        self.collects.add(gc.isenabled())
        assert not path.exists()
        path.mkdir()
        torch.save(state, path / "state.pt")
        self._log.append((self.name, "save"))

    def load(self, state, path):
        assert not local_tensors(state)[0].any()
        if not self.is_lossy:
            state["w"].copy_(torch.load(path / "state.pt")["w"])
        self._log.append((self.name, "load"))


def setup(tmp_path, log, num_rounds=2, collect_garbage=False):
    state = {"w": torch.ones(10)}
    target = blank_copy(state)
    runners = [RecordingRunner("ours", log), RecordingRunner("stock", log, caches_plans=False)]
    limit = Limit([state["w"]], [target["w"]], num_threads=1, sync=True)

    def run():
        return measure(
            state,
            target,
            runners,
            limit,
            tmp_path,
            num_rounds=num_rounds,
            flush=False,
            collect_garbage=collect_garbage,
            together=Alone(),
            progress=lambda line: log.append(("progress", line)),
        )

    return run, runners


def test_every_side_gives_one_sample_per_round_after_a_warm_up(tmp_path):
    run, _ = setup(tmp_path, [], num_rounds=3)
    samples = run()
    assert list(samples) == ["first_save", "repeated_save", "load"]
    for sides in samples.values():
        assert sorted(sides) == ["limit", "ours", "stock"]
        assert all(len(values) == 3 for values in sides.values())
    assert list(tmp_path.iterdir()) == []


def test_a_first_save_follows_a_forget_and_a_repeated_one_follows_the_first(tmp_path):
    log: list[tuple[str, str]] = []
    run, _ = setup(tmp_path, log)
    run()
    ours = [what for who, what in log if who == "ours"]
    assert ours == ["forget", "save", "save", "load"] * 3
    # Stock keeps nothing between saves: one is measured. Its additional load is the cross-check of the warm-up.
    stock = [what for who, what in log if who == "stock"]
    assert sorted(stock) == sorted(["forget", "save", "load"] * 3 + ["load"])


def test_another_side_begins_each_round(tmp_path):
    log: list[tuple[str, str]] = []
    run, _ = setup(tmp_path, log)
    run()
    starts = [log[index + 1][0] for index, entry in enumerate(log) if entry[0] == "progress"]
    assert starts == ["ours", "stock", "ours"]
    assert [what for who, what in log if who == "progress"] == ["warm-up", "round 1 of 2", "round 2 of 2"]


def test_what_stock_cannot_read_of_ours_is_an_error(tmp_path):
    run, runners = setup(tmp_path, [])
    runners[1].is_lossy = True
    with pytest.raises(VerificationError, match="saved by ours, loaded by stock: 1 value.* w"):
        run()


@pytest.mark.parametrize("collect_garbage", [False, True])
def test_garbage_collection_is_off_in_timed_parts_unless_asked_for(tmp_path, collect_garbage):
    run, runners = setup(tmp_path, [], collect_garbage=collect_garbage)
    run()
    assert [runner.collects for runner in runners] == [{collect_garbage}] * 2


def test_garbage_collection_is_on_again_after_a_failure(tmp_path):
    run, runners = setup(tmp_path, [])
    runners[0].load = lambda state, path: shutil.rmtree(path / "missing")
    with pytest.raises(FileNotFoundError):
        run()
    assert gc.isenabled()
