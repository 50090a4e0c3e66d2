"""The ``_async`` flags: checkpoints are those of synchronous saves, and what follows a save follows its commit."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from dcp_plugins.errors import CheckpointException
from dcp_plugins.lightning import DCPCheckpointIO, is_committed
from dcp_plugins.storage.companion import CompanionWriter
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.trainers import Regression, Ticks, digest, fit, trainer, whole_state

FLAGS = pytest.mark.parametrize(
    ("flag", "ranks"), [("dcp", 1), ("dcp_ddp", 2), ("dcp_fsdp", 2), ("dcp_fsdp2", 2)], ids=lambda value: str(value)
)


def every_step(folder: Path, **options: Any) -> ModelCheckpoint:
    settings: dict[str, Any] = {"monitor": "step", "mode": "max", "save_top_k": -1, "every_n_train_steps": 1}
    return ModelCheckpoint(folder, "{step}", **(settings | options))


class At(Callback):
    """Does something before the training of a batch, after the checkpoint of that step."""

    def __init__(self, step: int, action: Callable[[pl.Trainer], None]) -> None:
        self.step = step
        self.action = action

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.action(trainer)


@contextmanager
def commits(instead: Callable[[CompanionWriter, Callable[[], None]], None]) -> Iterator[None]:
    """Call ``instead(writer, commit)`` where a save would commit."""
    commit = CompanionWriter.finish

    def finish(writer: CompanionWriter, *args: Any, **kwargs: Any) -> None:
        instead(writer, lambda: commit(writer, *args, **kwargs))

    CompanionWriter.finish = finish  # type: ignore[method-assign]
    try:
        yield
    finally:
        CompanionWriter.finish = commit  # type: ignore[method-assign]


# -- The same checkpoints --------------------------------------------------------------------------------------------


class Normed(Regression):
    """Has buffers that every forward pass changes, an average of the weights, and gradients over two batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(10)
        self.register_buffer("average", torch.zeros(10))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(batch_idx)
        x = self.batch_norm(torch.randn(8, 10, generator=generator))
        self.average += batch_idx
        return self.net(x).square().mean()


def save_each_step(flag: str, folder: Path) -> None:
    options = {"accumulate_grad_batches": 2, "callbacks": [every_step(folder)]}
    fit(flag, devices=int(os.environ["WORLD_SIZE"]), steps=4, module=Normed(), **options)


@FLAGS
def test_each_checkpoint_is_bit_for_bit_the_synchronous_one_of_its_step(tmp_path: Path, flag: str, ranks: int) -> None:
    run_ranks(ranks, save_each_step, flag, tmp_path / "sync")
    run_ranks(ranks, save_each_step, f"{flag}_async", tmp_path / "async")
    names = [f"step={step}.ckpt" for step in range(1, 5)]
    assert sorted(os.listdir(tmp_path / "async")) == names
    states = []
    for name in names:
        ours, theirs = (DCPCheckpointIO().load_checkpoint(tmp_path / kind / name) for kind in ("async", "sync"))
        assert digest(ours["state_dict"]) == digest(theirs["state_dict"])
        assert digest(ours["optimizer_states"][0]) == digest(theirs["optimizer_states"][0])
        assert ours["optimizer_states"][0]["param_groups"] == theirs["optimizer_states"][0]["param_groups"]
        assert ours["loops"] == theirs["loops"]
        assert ours["lr_schedulers"] == theirs["lr_schedulers"]
        states.append(digest(ours["state_dict"]))
    assert states[0] != states[1]


def resume(flag: str, folder: Path) -> tuple[Any, Any, Any]:
    devices = int(os.environ["WORLD_SIZE"])
    whole = fit(flag, devices=devices, steps=6)
    fit(flag, devices=devices, steps=3, callbacks=[every_step(folder, save_last=True, save_top_k=1)])
    rest = fit(flag, devices=devices, steps=6, callbacks=[every_step(folder, save_last=True)], resume="last")
    assert sorted(rest.losses) == [3, 4, 5]
    return {step: whole.losses[step] for step in rest.losses}, rest.losses, whole_state(whole) == whole_state(rest)


@FLAGS
def test_a_resumed_run_goes_on_as_if_it_had_not_been_interrupted(tmp_path: Path, flag: str, ranks: int) -> None:
    for expected, found, same_state in run_ranks(ranks, resume, f"{flag}_async", tmp_path):
        assert found == expected
        assert same_state


# -- What follows a commit -------------------------------------------------------------------------------------------


def hold_the_second_save(folder: Path, save_last: Any) -> dict[str, Any]:
    """Train on while the commit of step 2 is held, and look at the directory then."""
    let_go = threading.Event()
    seen: dict[str, Any] = {}

    def commit(writer: CompanionWriter, do: Callable[[], None]) -> None:
        if writer.path.name == "step=2.ckpt":
            assert let_go.wait(20)
        do()

    def look(trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            seen["names"] = sorted(os.listdir(folder))
            seen["committed"] = [name for name in seen["names"] if is_committed(folder / name)]
            seen["last"] = os.readlink(folder / "last.ckpt") if (folder / "last.ckpt").is_symlink() else None
        let_go.set()

    callback = every_step(folder, save_top_k=1, save_last=save_last)
    with commits(commit):
        fit("dcp_ddp_async", devices=2, steps=2, callbacks=[callback, At(2, look), Looker(look)])
    return seen


class Looker(Callback):
    """Looks at the end of training, before the last save is awaited."""

    def __init__(self, look: Callable[[pl.Trainer], None]) -> None:
        self.look = look

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(trainer)


def test_the_checkpoint_that_a_save_replaces_is_deleted_after_the_commit(tmp_path: Path) -> None:
    seen = run_ranks(2, hold_the_second_save, tmp_path, None)[0]
    assert seen["names"] == ["step=1.ckpt", "step=2.ckpt"]
    assert seen["committed"] == ["step=1.ckpt"]
    assert os.listdir(tmp_path) == ["step=2.ckpt"]
    assert is_committed(tmp_path / "step=2.ckpt")


def test_the_link_to_the_last_checkpoint_never_leads_to_one_that_is_not_committed(tmp_path: Path) -> None:
    seen = run_ranks(2, hold_the_second_save, tmp_path, "link")[0]
    assert seen["last"] == "step=1.ckpt"
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=2.ckpt"]
    assert (tmp_path / "last.ckpt").resolve() == tmp_path / "step=2.ckpt"


# -- Kills -----------------------------------------------------------------------------------------------------------


def die_in_the_background(folder: Path, doomed: str, save_last: Any, at_step: int) -> None:
    """Kill every rank while the save called ``doomed`` is in the background and training has gone on."""
    held, never = threading.Event(), threading.Event()

    def commit(writer: CompanionWriter, do: Callable[[], None]) -> None:
        if writer.path.name == doomed:
            held.set()
            never.wait(30)
        do()

    def die(trainer: pl.Trainer) -> None:
        # The save before it takes its time, too.
        if trainer.is_global_zero:
            assert held.wait(20)
        trainer.strategy.barrier()
        os.kill(os.getpid(), signal.SIGKILL)

    callback = every_step(folder, save_top_k=1, save_last=save_last, every_n_train_steps=2)
    with commits(commit):
        fit("dcp_fsdp2_async", devices=2, steps=6, callbacks=[callback, At(at_step, die)])


def resume_from_last(folder: Path, save_last: Any) -> tuple[list[int], str]:
    callback = every_step(folder, save_top_k=1, save_last=save_last, every_n_train_steps=2)
    module = fit("dcp_fsdp2_async", devices=2, steps=6, callbacks=[callback], resume="last")
    return sorted(module.losses), callback.best_model_path


@pytest.mark.parametrize(
    ("save_last", "doomed", "at_step"), [("link", "step=4.ckpt", 5), (True, "last.ckpt", 3)], ids=["link", "copy"]
)
def test_after_a_kill_in_the_background_last_is_the_last_committed_checkpoint(
    tmp_path: Path, save_last: Any, doomed: str, at_step: int
) -> None:
    run_ranks(2, die_in_the_background, tmp_path, doomed, save_last, at_step, expect_deaths=True)
    assert (tmp_path / doomed).is_dir()
    assert not is_committed(tmp_path / doomed)
    for losses, best in run_ranks(2, resume_from_last, tmp_path, save_last):
        assert losses == [2, 3, 4, 5]
        assert best == str(tmp_path / "step=6.ckpt")
    assert is_committed(tmp_path / "step=6.ckpt")
    assert is_committed(tmp_path / "last.ckpt")


def test_a_run_that_was_killed_in_its_first_save_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").mkdir()
    for losses, _ in run_ranks(2, resume_from_last, tmp_path, True):
        assert losses == list(range(6))
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=6.ckpt"]
    assert all(is_committed(tmp_path / name) for name in os.listdir(tmp_path))


# -- Failures --------------------------------------------------------------------------------------------------------


def fail_in_the_background(folder: Path, steps: int) -> tuple[str, int]:
    def commit(writer: CompanionWriter, do: Callable[[], None]) -> None:
        if writer.path.name == "step=2.ckpt":
            raise OSError(28, "No space left on device")
        do()

    module = Regression()
    runner = trainer("dcp_ddp_async", devices=2, steps=steps, callbacks=[every_step(folder, save_top_k=1)])
    try:
        with commits(commit):
            runner.fit(module, Ticks(100))
    except CheckpointException as exc:
        return str(exc), runner.global_step
    return "", runner.global_step


@pytest.mark.parametrize(("steps", "raised_at"), [(6, 3), (2, 2)], ids=["at the next save", "at the end of fit"])
def test_a_save_that_failed_raises_on_every_rank_and_what_it_was_to_replace_stays(
    tmp_path: Path, steps: int, raised_at: int
) -> None:
    for message, step in run_ranks(2, fail_in_the_background, tmp_path, steps):
        assert "No space left on device" in message
        assert step == raised_at
    assert is_committed(tmp_path / "step=1.ckpt")
    assert not is_committed(tmp_path / "step=2.ckpt")


def fail_to_begin(folder: Path) -> tuple[str, str]:
    class Uncopyable:
        def __deepcopy__(self, memo: Any) -> None:
            raise TypeError("not to be copied")

    module = Regression()
    if int(os.environ["RANK"]) == 1:
        module.on_save_checkpoint = (  # type: ignore[method-assign]
            lambda checkpoint: checkpoint["state_dict"].update(bad=Uncopyable())
        )
    try:
        fit("dcp_ddp_async", devices=2, steps=3, module=module, callbacks=[every_step(folder)])
    except Exception as exc:
        return type(exc).__name__, str(exc)
    return "", ""


def test_a_rank_that_cannot_begin_a_save_makes_every_rank_raise(tmp_path: Path) -> None:
    (first, message), (second, own) = run_ranks(2, fail_to_begin, tmp_path)
    assert first == "CheckpointException"
    assert "rank(s) failed: 1" in message
    assert second == "UnsupportedValueError"
    assert "state_dict.bad" in own


def end_early(folder: Path, how: str) -> str:
    slow = threading.Event()

    def commit(writer: CompanionWriter, do: Callable[[], None]) -> None:
        slow.wait(0.3)
        do()

    def stop(trainer: pl.Trainer) -> None:
        if how == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise KeyboardInterrupt if how == "KeyboardInterrupt" else ZeroDivisionError

    try:
        with commits(commit):
            fit("dcp_async", devices=1, steps=9, callbacks=[every_step(folder), At(2, stop)])
    except (ZeroDivisionError, SIGTERMException, SystemExit) as exc:
        return type(exc).__name__
    return ""


@pytest.mark.parametrize(
    ("how", "raised"),
    [
        ("exception", "ZeroDivisionError"),
        ("KeyboardInterrupt", "SystemExit"),
        ("SIGTERM", "SIGTERMException"),
    ],
)
def test_what_ends_training_early_finishes_the_save_in_flight(tmp_path: Path, how: str, raised: str) -> None:
    assert run_ranks(1, end_early, tmp_path, how) == [raised]
    names = os.listdir(tmp_path)
    assert "step=2.ckpt" in names
    assert all(is_committed(tmp_path / name) for name in names)


def fail_twice(folder: Path) -> str:
    def commit(writer: CompanionWriter, do: Callable[[], None]) -> None:
        raise OSError(28, "No space left on device")

    def stop(trainer: pl.Trainer) -> None:
        raise ZeroDivisionError

    try:
        with commits(commit):
            fit("dcp_async", devices=1, steps=9, callbacks=[every_step(folder, every_n_train_steps=2), At(2, stop)])
    except Exception as exc:
        return type(exc).__name__
    return ""


def test_a_failed_save_does_not_hide_the_exception_that_ended_training(tmp_path: Path) -> None:
    assert run_ranks(1, fail_twice, tmp_path) == ["ZeroDivisionError"]


# -- Around the fit --------------------------------------------------------------------------------------------------


def outside_of_a_fit(folder: Path) -> tuple[bool, int, int]:
    callback = every_step(folder)
    module = Regression()
    runner = trainer("dcp_async", devices=1, steps=2, callbacks=[callback])
    runner.fit(module, Ticks(100))
    threads = sum(thread.name.startswith("dcp-") for thread in threading.enumerate())
    runner.save_checkpoint(folder / "own.ckpt")
    committed = is_committed(folder / "own.ckpt")
    runner.validate(module, Ticks(1), ckpt_path="best", verbose=False)
    return committed, threads, len(module.seen)


def test_after_a_fit_no_thread_is_left_and_a_save_is_committed_when_it_returns(tmp_path: Path) -> None:
    assert run_ranks(1, outside_of_a_fit, tmp_path) == [(True, 0, 1)]


def test_a_load_waits_for_the_save_in_flight(tmp_path: Path) -> None:
    slow = threading.Event()

    def commit(writer: CompanionWriter, do: Callable[[], None]) -> None:
        slow.wait(0.3)
        do()

    plugin = DCPCheckpointIO(overlap_staging=False)
    with commits(commit):
        plugin.begin_save({"state_dict": {"w": torch.ones(3)}, "global_step": 7}, tmp_path / "a")
        assert not is_committed(tmp_path / "a")
        assert plugin.load_checkpoint(tmp_path / "a")["global_step"] == 7
    plugin.teardown()


def clip_in_a_hook(folder: Path, plugin: DCPCheckpointIO) -> None:
    def clip(trainer: pl.Trainer) -> None:
        for parameter in trainer.lightning_module.parameters():
            parameter.data.fill_(0.5)

    fit("dcp_async", devices=1, steps=3, callbacks=[every_step(folder), At(2, clip)], plugins=[plugin])


def test_without_overlap_parameters_may_be_changed_as_soon_as_a_save_has_returned(tmp_path: Path) -> None:
    run_ranks(1, clip_in_a_hook, tmp_path, DCPCheckpointIO(overlap_staging=False))
    state = DCPCheckpointIO().load_checkpoint(tmp_path / "step=2.ckpt")["state_dict"]
    assert not torch.equal(state["net.head.weight"], torch.full_like(state["net.head.weight"], 0.5))
