"""Kills and failures at every step of a save: the last committed checkpoint loads, and nobody is left waiting."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.strategies.fsdp import _is_sharded_checkpoint

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointException, CheckpointNotFoundError
from dcp_plugins.lightning import DCPCheckpointIO, is_committed, last_checkpoint, remove_uncommitted
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.trainers import Regression, Ticks, fit, trainer, whole_state
from tests.programs import run_program

ROOT = Path(__file__).parents[3]


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_at(path: Path, steps: int, flag: str = "dcp_fsdp2") -> dict[str, str]:
    return whole_state(fit(flag, devices=2, steps=steps, save_to=path))


def die_before_the_commit(path: Path, flag: str) -> None:
    dcp.FileSystemWriter.finish = die  # type: ignore[method-assign]
    save_with_a_dying_peer(path, flag)


def die_after_the_commit(path: Path) -> None:
    commit = dcp.FileSystemWriter.finish

    def commit_and_die(*args: Any, **kwargs: Any) -> None:
        commit(*args, **kwargs)
        die()

    dcp.FileSystemWriter.finish = commit_and_die  # type: ignore[method-assign]
    save_with_a_dying_peer(path)


def save_with_a_dying_peer(path: Path, flag: str = "dcp_fsdp2") -> None:
    with pytest.raises(CheckpointException, match="lost contact"):
        save_at(path, 4, flag)


def load(path: Path, flag: str = "dcp_fsdp2") -> tuple[int, dict[str, str]]:
    step = DCPCheckpointIO().load_checkpoint(path)["global_step"]
    return step, whole_state(fit(flag, devices=2, steps=step, resume=path))


@pytest.mark.parametrize("flag", ["dcp_fsdp", "dcp_fsdp2"])
def test_a_kill_before_the_commit_of_an_overwrite_leaves_the_previous_checkpoint_whole(
    tmp_path: Path, flag: str
) -> None:
    path = tmp_path / "last.ckpt"
    saved = run_ranks(2, save_at, path, 2, flag)[0]
    run_ranks(2, die_before_the_commit, path, flag, expect_deaths=True, timeout_seconds=20)
    assert run_ranks(2, load, path, flag)[0] == (2, saved)
    assert not _is_sharded_checkpoint(path), "stock Lightning must not pair it with a meta.pt of another save"
    saved = run_ranks(2, save_at, path, 3, flag)[0]
    assert run_ranks(2, load, path, flag)[0] == (3, saved)
    assert sorted(name for name in os.listdir(path) if not name.endswith(".distcp")) == [".metadata", "meta.pt"]
    assert len(os.listdir(path)) == 4, "what the killed save left is reclaimed"


def test_a_kill_after_the_commit_leaves_the_new_checkpoint_whole(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    run_ranks(2, save_at, path, 2)
    run_ranks(2, die_after_the_commit, path, expect_deaths=True, timeout_seconds=20)
    step, _ = run_ranks(2, load, path)[0]
    assert step == 4
    assert not _is_sharded_checkpoint(path)


def fail_to_encode(path: Path) -> str:
    module = Regression()
    runner = trainer("dcp_ddp", devices=2, steps=1)
    runner.fit(module, Ticks(10))
    if module.global_rank == 0:
        module.on_save_checkpoint = lambda checkpoint: checkpoint.update(stream=sys.stdout)  # type: ignore[method-assign]
    try:
        runner.save_checkpoint(path)
    except CheckpointException as exc:
        return str(exc)
    return ""


def test_what_rank_0_cannot_pickle_fails_on_every_rank(tmp_path: Path) -> None:
    for message in run_ranks(2, fail_to_encode, tmp_path / "a.ckpt"):
        assert "rank(s) failed: 0" in message
        assert "TextIOWrapper" in message
    assert not is_committed(tmp_path / "a.ckpt")


def hide_a_shard(strategy: str, path: Path) -> str:
    module = Regression()
    runner = trainer(strategy, devices=2, steps=1)
    runner.fit(module, Ticks(10))
    module.on_save_checkpoint = lambda checkpoint: checkpoint.update(  # type: ignore[method-assign]
        ema=[dict(module.named_parameters())], twice=dict(checkpoint["state_dict"])
    )
    try:
        runner.save_checkpoint(path)
    except CheckpointException as exc:
        return str(exc)
    return ""


@pytest.mark.parametrize(
    ("strategy", "parameter"),
    [("dcp_fsdp", "net.blocks.0._fsdp_wrapped_module.linear.bias"), ("dcp_fsdp2", "net.blocks.0.linear.bias")],
)
def test_sharded_tensors_outside_the_state_dicts_are_refused_by_name(
    tmp_path: Path, strategy: str, parameter: str
) -> None:
    for message in run_ranks(2, hide_a_shard, strategy, tmp_path / "a.ckpt"):
        assert f"checkpoint['ema'][0]['{parameter}']" in message
        assert "checkpoint['twice']['net.blocks.0.linear.bias']" in message


def resume_from_litter(folder: Path) -> str:
    try:
        fit("dcp_fsdp2", devices=2, steps=4, resume=folder / "step=9.ckpt")
    except CheckpointNotFoundError as exc:
        return str(exc)
    return ""


def test_resuming_from_an_uncommitted_directory_names_the_newest_good_one(tmp_path: Path) -> None:
    run_ranks(2, save_at, tmp_path / "step=2.ckpt", 2)
    (tmp_path / "step=9.ckpt").mkdir()
    for message in run_ranks(2, resume_from_litter, tmp_path):
        assert "step=9.ckpt is not a checkpoint" in message
        assert "step=2.ckpt" in message


def save_alone(path: Path, step: int) -> None:
    DCPCheckpointIO().save_checkpoint({"state_dict": {"w": torch.full((3,), float(step))}, "global_step": step}, path)


def test_the_last_checkpoint_is_the_committed_one_of_the_highest_step_whatever_the_times(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert last_checkpoint(tmp_path) is None
    for name, step in (("b", 20), ("a", 100), ("c", 9)):
        save_alone(tmp_path / name, step)
    save_alone(tmp_path / "killed", 300)
    (tmp_path / "killed" / ".metadata").unlink()
    (tmp_path / "file.ckpt").write_bytes(b"")
    (tmp_path / "link").symlink_to("b")
    os.utime(tmp_path / "c")
    assert last_checkpoint(tmp_path) == tmp_path / "a"


def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path: Path) -> None:
    save_alone(tmp_path / "a", 1)
    save_alone(tmp_path / "b", 2)
    (tmp_path / "b" / ".metadata").write_bytes(b"not a pickle")
    with pytest.warns(UserWarning, match="Skipped the checkpoint .*b"):
        assert last_checkpoint(tmp_path) == tmp_path / "a"


def test_what_killed_saves_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    save_alone(tmp_path / "good", 1)
    save_alone(tmp_path / "killed", 2)
    (tmp_path / "killed" / ".metadata").unlink()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "events").write_text("mine")
    assert remove_uncommitted(tmp_path) == [tmp_path / "killed"]
    assert sorted(os.listdir(tmp_path)) == ["good", "logs"]


def test_removal_takes_the_commit_first_and_of_a_link_the_link_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_alone(tmp_path / "a", 1)
    (tmp_path / "link").symlink_to("a")
    plugin = DCPCheckpointIO()
    plugin.remove_checkpoint(tmp_path / "link")
    assert is_committed(tmp_path / "a")

    def fail(path: Path) -> None:
        raise OSError("killed here")

    monkeypatch.setattr("dcp_plugins.manager.directory.shutil.rmtree", fail)
    with pytest.raises(OSError, match="killed here"):
        plugin.remove_checkpoint(tmp_path / "a")
    assert not is_committed(tmp_path / "a")
    monkeypatch.undo()
    plugin.remove_checkpoint(tmp_path / "a")
    plugin.remove_checkpoint(tmp_path / "a")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_resumes_a_run_killed_in_mid_save(tmp_path: Path) -> None:
    demo = ROOT / "examples" / "lightning_demo.py"
    done = run_program(demo, "--quick", "--out", str(tmp_path / "out"), folder=ROOT, timeout_seconds=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 ranks every loss is identical, bit for bit" in done.stdout
    assert "FAIL" not in done.stdout
    assert "on 1 rank(s) losses differ by rounding only" in done.stdout


def test_the_demo_times_what_saves_cost(tmp_path: Path) -> None:
    size = ["--width", "64", "--depth", "2", "--length", "32"]
    options = ["--steps", "4", "--every", "2", "--rounds", "1", "--strategy", "dcp_fsdp2_async", *size]
    done = run_program(ROOT / "examples" / "lightning_overhead.py", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "with a save every 2 (dcp_fsdp2_async)" in done.stdout
