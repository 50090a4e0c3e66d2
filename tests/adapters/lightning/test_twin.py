"""``ModelCheckpoint(save_last=True)`` in the background: one step saved twice is written once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from torch import nn

from dcp_plugins.lightning import DCPCheckpointIO, is_committed
from dcp_plugins.lightning.twin import Fingerprint
from dcp_plugins.manager import verify_checkpoint
from dcp_plugins.storage.companion import CompanionWriter
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.test_async import At, commits, every_step
from tests.adapters.lightning.trainers import WIDTH, Net, Regression, digest, fit

FLAGS = pytest.mark.parametrize(
    ("flag", "ranks"),
    [("dcp_async", 1), ("dcp_ddp_async", 2), ("dcp_fsdp_async", 2), ("dcp_fsdp2_async", 2)],
    ids=lambda value: str(value),
)


class Counting(Regression):
    """Counts its saves in what is no tensor."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saves = getattr(self, "saves", 0) + 1
        checkpoint["saves"] = self.saves


def go_on_beside_two_saves(flag: str, folder: Path) -> bool:
    """Train on while the first of the two saves of step 2 cannot commit: the second must not wait for it."""
    let_go = threading.Event()
    waited = []

    def commit(writer: CompanionWriter, do: Callable[[], None]) -> None:
        if writer.path.name == "step=2.ckpt":
            waited.append(let_go.wait(20))
        do()

    callback = every_step(folder, save_top_k=-1, save_last=True, every_n_train_steps=2)
    with commits(commit):
        ranks = torch.distributed.get_world_size()
        fit(flag, devices=ranks, steps=5, module=Counting(), callbacks=[callback, At(3, lambda _: let_go.set())])
    return all(waited)


@FLAGS
def test_the_second_save_of_a_step_does_not_wait_for_the_first(tmp_path: Path, flag: str, ranks: int) -> None:
    assert all(run_ranks(ranks, go_on_beside_two_saves, flag, tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]
    last, step = tmp_path / "last.ckpt", tmp_path / "step=4.ckpt"
    verify_checkpoint(last)
    shared = {entry.name for entry in last.iterdir() if entry.stat().st_nlink > 1}
    assert shared
    assert shared <= {entry.name for entry in step.glob("*.distcp")}
    # The tensors are the same, the rest is that of each moment.
    ours, other = (DCPCheckpointIO().load_checkpoint(path) for path in (last, step))
    assert digest(ours["state_dict"]) == digest(other["state_dict"])
    assert digest(ours["optimizer_states"][0]) == digest(other["optimizer_states"][0])
    assert ours["global_step"] == other["global_step"] == 4
    assert (other["saves"], ours["saves"]) == (3, 4)
    assert torch.load(last / "meta.pt")["saves"] == 4
    # Stock reads it, also once the other one is deleted.
    DCPCheckpointIO().remove_checkpoint(step)
    key = "model" if flag == "dcp_fsdp_async" else "state_dict"
    weight = {key: {"net.head.weight": torch.zeros(1, 10)}}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        stock.load(weight, checkpoint_id=last, no_dist=True)
    assert torch.equal(weight[key]["net.head.weight"], ours["state_dict"]["net.head.weight"])


class Changing(Counting):
    """What it saves is another tensor each time, though nothing has been trained in between."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"]["saves"] = torch.tensor(self.saves)


def save_what_changes(folder: Path) -> None:
    callback = every_step(folder, save_top_k=1, save_last=True)
    fit("dcp_ddp_async", devices=2, steps=1, module=Changing(), callbacks=[callback])


def test_what_is_not_the_same_is_saved_again(tmp_path: Path) -> None:
    run_ranks(2, save_what_changes, tmp_path)
    for name, saves in (("step=1.ckpt", 1), ("last.ckpt", 2)):
        assert DCPCheckpointIO().load_checkpoint(tmp_path / name)["state_dict"]["saves"] == saves


class Uncounted(Regression):
    """Changes what it is made of by writes that torch does not count, in steps that Lightning does not count."""

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.saved: dict[str, dict[str, str]] = {}
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("variance", torch.ones(WIDTH))

    def save(self, name: str) -> None:
        self.trainer.save_checkpoint(self.folder / name)
        self.saved[name] = digest(self.state_dict())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.trainer.optimizers[0]
        self.save(f"before-{batch_idx}.ckpt")
        if batch_idx != 1:
            optimizer.step()
            self.save(f"stepped-{batch_idx}.ckpt")
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(batch_idx))
        x = nn.functional.batch_norm(x, self.mean, self.variance, training=True)
        optimizer.zero_grad()
        self.manual_backward(self.net(x).square().mean())
        self.trainer.should_stop = batch_idx == 3

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, fused=True)


def save_uncounted(folder: Path) -> tuple[int, dict[str, dict[str, str]]]:
    module = Uncounted()
    module.folder = folder
    fit("dcp_async", devices=1, steps=1, module=module, limit_val_batches=0)
    return module.global_step, module.saved


def test_a_step_or_a_forward_pass_in_between_is_never_taken_for_no_change(tmp_path: Path) -> None:
    [(global_step, saved)] = run_ranks(1, save_uncounted, tmp_path)
    assert global_step == 0
    assert len(saved) == 7
    for name, expected in saved.items():
        assert digest(DCPCheckpointIO().load_checkpoint(tmp_path / name)["state_dict"]) == expected, name


def test_only_what_is_the_same_for_certain_counts_as_the_same() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(2, 10)).sum().backward()
    optimizer.step()

    def now(**more: Any) -> Fingerprint:
        return Fingerprint({"model": net.state_dict(), "optimizer": optimizer.state_dict(), **more}, net, [optimizer])

    before = now(betas=[1, 2])
    assert before.proves_same(now(betas=[1, 2]))
    assert not before.proves_same(now(betas=[1, 3]))
    copied = now(average=net.head.weight.detach().clone())
    assert not copied.proves_same(copied)
    unknown = now(step=lambda: None)
    assert not unknown.proves_same(unknown)
    before = now()
    net.scale += 1
    assert not before.proves_same(now())
    before = now()
    optimizer.state[net.head.weight]["exp_avg"].mul_(2)
    assert not before.proves_same(now())
    before = now()
    net.head.weight = torch.nn.Parameter(net.head.weight.detach().clone())
    assert not before.proves_same(now())


def fail(folder: Path, doomed: str, steps: int) -> tuple[str, int]:
    def commit(writer: CompanionWriter, do: Callable[[], None]) -> None:
        if writer.path.name == doomed:
            raise OSError(28, "No space left on device")
        do()

    module = Regression()
    callback = every_step(folder, save_top_k=-1, save_last=True, every_n_train_steps=2)
    try:
        with commits(commit):
            fit("dcp_ddp_async", devices=2, steps=steps, module=module, callbacks=[callback])
    except Exception as exc:
        return str(exc), len(module.losses)
    return "", len(module.losses)


@pytest.mark.parametrize(("steps", "raised_at"), [(6, 4), (2, 2)], ids=["at the next save", "at the end of fit"])
@pytest.mark.parametrize("doomed", ["step=2.ckpt", "last.ckpt"])
def test_a_failure_of_either_is_raised_on_every_rank(tmp_path: Path, doomed: str, steps: int, raised_at: int) -> None:
    for message, found in run_ranks(2, fail, tmp_path, doomed, steps):
        assert "No space left on device" in message
        assert found == raised_at
    committed = [name for name in sorted(os.listdir(tmp_path)) if is_committed(tmp_path / name)]
    assert committed == ([] if doomed == "step=2.ckpt" else ["step=2.ckpt"])


def save_twice_around_a_wait(folder: Path, doomed: str) -> tuple[str, str]:
    """Save a step twice, with the first save finished by hand in between; return what either call has raised."""

    def commit(writer: CompanionWriter, do: Callable[[], None]) -> None:
        if writer.path.name == doomed:
            raise OSError(28, "No space left on device")
        do()

    found = {"": "", "finish": ""}

    def save(trainer: Any) -> None:
        trainer.save_checkpoint(folder / "first")
        try:
            trainer.strategy.checkpoint_io.finish()
        except Exception as exc:
            found["finish"] = str(exc)
        trainer.save_checkpoint(folder / "second")

    try:
        with commits(commit):
            fit("dcp_ddp_async", devices=2, steps=3, callbacks=[At(2, save)])
    except Exception as exc:
        found[""] = str(exc)
    return found["finish"], found[""]


@pytest.mark.parametrize("doomed", ["first", "second"])
def test_a_step_is_saved_again_also_when_the_first_save_has_ended(tmp_path: Path, doomed: str) -> None:
    for first, second in run_ranks(2, save_twice_around_a_wait, tmp_path, doomed):
        assert ("No space left" in first, "No space left" in second) == (doomed == "first", doomed == "second")
    assert [is_committed(tmp_path / name) for name in ("first", "second")] == [doomed == "second", doomed == "first"]
