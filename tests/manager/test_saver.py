"""Saves one after another: the same checkpoint however it is written, failures raised once and on every rank."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dcp_plugins as dcp
from dcp_plugins.manager import SaveOptions, Saver, expected_warnings, is_committed
from dcp_plugins.manager.saver import _Writer
from dcp_plugins.testing.ranks import run_ranks


@contextmanager
def commits(instead: Callable[[_Writer, Callable[[], None]], None]) -> Iterator[None]:
    """Call ``instead(writer, commit)`` where a save would commit."""

    def finish(writer: _Writer, *args: Any, **kwargs: Any) -> None:
        instead(writer, lambda: dcp.FileSystemWriter.finish(writer, *args, **kwargs))

    _Writer.finish = finish
    try:
        yield
    finally:
        del _Writer.finish


def fail_second(writer: _Writer, commit: Callable[[], None]) -> None:
    if writer.path.name == "b":
        raise OSError(28, "No space left on device")
    commit()


def train(options: SaveOptions, folder: Path) -> list[torch.Tensor]:
    """Save after each of three steps, and return the weights as they were."""
    model = nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(model.parameters())
    saver = Saver(options)
    weights = []
    for step in range(3):
        model(torch.ones(2, 30)).square().sum().backward()
        optimizer.step()
        weights.append(model.weight.detach().clone())
        state = {"model": model, "optimizer": optimizer, "step": step}
        saver.save(state, folder / f"step_{step}", optimizers=[optimizer])
    assert saver.newest == folder / "step_2"
    saver.close()
    saver.close()
    return weights


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("kind", ["off", "thread", "process"])
def test_each_checkpoint_is_that_of_its_step_however_it_is_saved(tmp_path: Path, kind: Any, overlap: bool) -> None:
    options = SaveOptions(asynchronous=kind, overlap_staging=overlap, sync_files=False, thread_count=1)
    # Earlier tests may have left threads.
    before = set(threading.enumerate())
    weights = train(options, tmp_path)
    for step, weight in enumerate(weights):
        loaded = dcp.load_from_keys(checkpoint_id=tmp_path / f"step_{step}")
        assert torch.equal(loaded["model"]["weight"], weight)
        assert loaded["step"] == step
    begun = set(threading.enumerate()) - before
    assert not [thread for thread in begun if thread.name.startswith(("dcp-staging", "dcp-after"))]


def test_what_follows_a_commit_waits_for_it_and_is_dropped_if_it_fails(tmp_path: Path) -> None:
    saver = Saver(SaveOptions(asynchronous="thread"))
    done: list[str] = []
    let_go = threading.Event()

    def hold(writer: _Writer, commit: Callable[[], None]) -> None:
        assert let_go.wait(20)
        fail_second(writer, commit)

    with commits(hold):
        saver.save({"x": 1}, tmp_path / "a")
        saver.after_commit(lambda: done.append("after a"))
        assert saver.is_busy
        assert done == []
        let_go.set()
        saver.finish()
        assert done == ["after a"]
        saver.save({"x": 2}, tmp_path / "b")
        saver.after_commit(lambda: done.append("after b"))
        saver.wait()
        with pytest.raises(dcp.CheckpointException, match="No space left"):
            saver.save({"x": 3}, tmp_path / "c")
        # Raised once: the next save is made.
        saver.save({"x": 3}, tmp_path / "c")
        saver.close()
    saver.after_commit(lambda: done.append("now"))
    assert done == ["after a", "now"]
    assert [name for name in sorted(os.listdir(tmp_path)) if is_committed(tmp_path / name)] == ["a", "c"]


def test_a_save_may_go_against_the_options(tmp_path: Path) -> None:
    let_go = threading.Event()

    def hold(writer: _Writer, commit: Callable[[], None]) -> None:
        assert let_go.wait(20)
        commit()

    saver = Saver()
    with commits(hold):
        saver.save({"x": 1}, tmp_path / "a", blocking=False)
        assert saver.is_busy
        let_go.set()
        saver.finish()
    Saver(SaveOptions(asynchronous="thread")).save({"x": 1}, tmp_path / "b", blocking=True)
    assert is_committed(tmp_path / "a")
    assert is_committed(tmp_path / "b")
    with pytest.raises(ValueError, match="path must be the same"):
        saver.save({"x": 1}, tmp_path / "c", writer=dcp.FileSystemWriter(tmp_path / "d"))


def test_other_optimizers_than_before_are_waited_for(tmp_path: Path) -> None:
    saver = Saver(SaveOptions(asynchronous="thread"))
    for name in ("a", "b"):
        weight = nn.Parameter(torch.ones(100))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        saver.save({"weight": weight}, tmp_path / name, optimizers=[optimizer])
        weight.grad = torch.ones(100)
        optimizer.step()
        saver.finish()
        with expected_warnings():
            assert torch.equal(dcp.load_from_keys(checkpoint_id=tmp_path / name)["weight"], torch.ones(100))
    saver.close()


class Uncopyable:
    def __deepcopy__(self, memo: Any) -> None:
        raise TypeError("not to be copied")


def fail_on_ranks(folder: Path) -> dict[str, str]:
    rank = dist.get_rank()
    saver = Saver(SaveOptions(asynchronous="thread"))
    seen = {}

    def attempt(name: str, value: Any) -> None:
        try:
            saver.save({"x": value, "w": torch.ones(3)}, folder / name)
            seen[name] = ""
        except Exception as exc:
            seen[name] = f"{type(exc).__name__}: {exc}"

    attempt("begin", Uncopyable() if rank == 1 else 1)
    with commits(fail_second):
        attempt("b", 1)
        attempt("c", 1)
    attempt("d", 1)
    try:
        # The one exception in the usage of all ranks together: alone.
        alone = Saver(no_dist=True)
        alone.save({"rank": rank}, folder / f"alone{rank}")
    finally:
        saver.close()
    return seen


def test_a_save_that_one_rank_cannot_begin_or_commit_is_raised_on_every_rank(tmp_path: Path) -> None:
    first, second = run_ranks(2, fail_on_ranks, tmp_path)
    assert first["begin"].startswith("CheckpointException")
    assert "rank(s) failed: 1" in first["begin"]
    assert second["begin"].startswith("UnsupportedValueError")
    for seen in (first, second):
        assert seen["b"] == ""
        assert "No space left" in seen["c"]
        assert seen["d"] == ""
    assert sorted(name for name in os.listdir(tmp_path) if is_committed(tmp_path / name)) == ["alone0", "alone1", "d"]
