"""Fabric's ``_async`` flags: what ``fabric.save`` returns before, and where a failure is raised."""

from __future__ import annotations

import os
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from dcp_plugins.errors import CheckpointException
from dcp_plugins.lightning import is_committed
from dcp_plugins.lightning.fabric import DCPFSDP2Strategy
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.fabrics import Run
from tests.adapters.lightning.test_async import commits
from tests.programs import run_program

FLAGS = pytest.mark.parametrize("flag", ["dcp_ddp_async", "dcp_fsdp_async", "dcp_fsdp2_async"])


def train_while_writing(flag: str, folder: Path) -> tuple[Any, ...]:
    let_go = threading.Event()

    def commit(writer: Any, do: Any) -> None:
        assert let_go.wait(20)
        do()

    with commits(commit):
        run = Run(flag).train(2)
        expected = run.digest()
        run.save(folder / "a").train(4)
        committed = is_committed(folder / "a")
        let_go.set()
        run.fabric.strategy.checkpoint_io.finish()
    again = Run(flag, seed=1)
    again.load(folder / "a")
    return committed, expected == again.digest(), again.state["step"]


@FLAGS
def test_training_goes_on_while_a_checkpoint_is_written_as_it_was(tmp_path: Path, flag: str) -> None:
    for outcome in run_ranks(2, train_while_writing, flag, tmp_path):
        assert outcome == (False, True, 2)


def save_in_a_process(folder: Path) -> tuple[Any, ...]:
    strategy = DCPFSDP2Strategy(asynchronous="process", thread_count=1, sync_files=False)
    run = Run(strategy).train(2)
    expected = run.digest()
    for name in ("a", "b"):
        run.save(folder / name).train(run.state["step"] + 1)
    strategy.checkpoint_io.teardown()
    again = Run("dcp_fsdp2", seed=1)
    again.load(folder / "a")
    return again.digest() == expected, again.state["step"], is_committed(folder / "b")


def test_a_process_of_its_own_writes_the_same(tmp_path: Path) -> None:
    assert run_ranks(2, save_in_a_process, tmp_path, timeout_seconds=120) == [(True, 2, True)] * 2


def fail(folder: Path) -> list[str]:
    def commit(writer: Any, do: Any) -> None:
        if writer.path.name == "b":
            raise OSError(28, "No space left on device")
        do()

    raised = []
    with commits(commit):
        run = Run("dcp_fsdp2_async").train(1).save(folder / "a").train(2).save(folder / "b").train(3)
        for act in (lambda: run.save(folder / "c"), run.fabric.strategy.checkpoint_io.finish):
            try:
                act()
            except CheckpointException as exc:
                raised.append(str(exc))
        run.save(folder / "c")
        run.fabric.strategy.checkpoint_io.finish()
    return raised


def test_a_failure_is_raised_once_by_the_next_save_and_the_one_after_succeeds(tmp_path: Path) -> None:
    for raised in run_ranks(2, fail, tmp_path):
        assert len(raised) == 1
        assert "No space left on device" in raised[0]
    assert [name for name in sorted(os.listdir(tmp_path)) if is_committed(tmp_path / name)] == ["a", "c"]


PROGRAM = """
    import sys
    from lightning.fabric import Fabric
    import torch
    import dcp_plugins.lightning
    from dcp_plugins.storage.companion import CompanionWriter

    if sys.argv[2] == "fail":
        def finish(*args, **kwargs):
            raise OSError(28, "No space left on device")
        CompanionWriter.finish = finish

    fabric = Fabric(accelerator="cpu", devices=1, strategy="dcp_ddp_async")
    fabric.launch()
    model = torch.nn.Linear(4, 4)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.save(sys.argv[1], {"model": model, "optimizer": optimizer})
"""


def test_the_end_of_the_program_waits_for_the_save_and_tells_of_its_failure(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(PROGRAM))
    done = run_program(script, str(tmp_path / "a"), "succeed", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert is_committed(tmp_path / "a")
    failed = run_program(script, str(tmp_path / "b"), "fail", folder=tmp_path)
    assert failed.returncode == 1
    assert "No space left on device" in failed.stderr
    assert not is_committed(tmp_path / "b")
