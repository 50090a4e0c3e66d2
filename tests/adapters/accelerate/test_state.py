"""What is saved and restored on one process: everything that was prepared or registered, hooks, names, and mistakes."""

from __future__ import annotations

import enum
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

import dcp_plugins as dcp
from dcp_plugins.accelerate import DCPPlugin, disable, enable, newest_checkpoint, write_stock_files
from dcp_plugins.errors import (
    CheckpointException,
    CheckpointNotFoundError,
    MissingExtraError,
    PlanError,
    UnloadableValueWarning,
    UnsafeCheckpointError,
    UnsupportedValueError,
)
from dcp_plugins.manager import is_committed
from dcp_plugins.storage import FileSystemWriter
from tests.adapters.accelerate.trainers import Counter, Net, accelerator_for, run, same


@pytest.fixture(autouse=True)
def _no_state_left_behind() -> Any:
    before = dict(os.environ)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.clear()
    os.environ.update(before)


def numbers() -> tuple[Any, ...]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_run_goes_on_bit_for_bit_with_scaler_random_numbers_and_data(tmp_path: Path) -> None:
    one = run("plain")
    one.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=1)
    one.train(3)
    one.accelerator.scaler.scale(torch.ones(()))
    one.accelerator.scaler._scale.fill_(64.0)
    one.data.set_epoch(2)
    saved = one.accelerator.save_state(str(tmp_path / "a"))
    assert saved == tmp_path / "a"
    expected = one.whole_state(), one.train(2), numbers()
    assert sorted(path.name for path in saved.iterdir() if path.suffix != ".distcp") == [
        ".metadata",
        "custom_checkpoint_0.pkl",
        "optimizer_0",
        "pytorch_model_fsdp_0",
        "random_states_0.pkl",
        "scaler.pt",
        "scheduler.bin",
    ]

    other = run("plain", seed=3)
    other.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    other.accelerator.load_state(str(tmp_path / "a"))
    assert other.counter.counted == 3
    assert other.accelerator.scaler.state_dict()["scale"] == 64.0
    assert same(other.whole_state(), expected[0])
    assert other.train(2) == expected[1]
    assert numbers() == expected[2]


def test_several_models_and_optimizers_are_told_apart(tmp_path: Path) -> None:
    def prepare(seed: int) -> tuple[Accelerator, list[Any], nn.Parameter]:
        accelerator = enable(accelerator_for("plain"), DCPPlugin())
        torch.manual_seed(seed)
        generator, critic, loose = Net(), nn.Linear(3, 1), nn.Parameter(torch.randn(3))
        ours = torch.optim.AdamW(generator.parameters())
        theirs = torch.optim.SGD(critic.parameters(), lr=0.1, momentum=0.9)
        both = torch.optim.Adagrad([*generator.parameters(), *critic.parameters(), loose], lr=0.01)
        return accelerator, list(accelerator.prepare(generator, critic, ours, theirs, both)), loose

    accelerator, prepared, loose = prepare(0)
    for _ in range(2):
        accelerator.backward((prepared[1](prepared[0](torch.randn(4, 5))) * loose.sum()).sum())
        for optimizer in prepared[2:]:
            optimizer.step()
    accelerator.save_state(tmp_path / "a")
    expected = [one.state_dict() for one in prepared]

    accelerator, prepared, loose = prepare(1)
    accelerator.load_state(tmp_path / "a")
    for one, before in zip(prepared, expected, strict=True):
        torch.testing.assert_close(one.state_dict(), before, rtol=0, atol=0)
    assert set(os.listdir(tmp_path / "a")) > {"pytorch_model_fsdp_1", "optimizer_2"}


def test_users_hooks_get_what_stock_gives_them_and_may_take_models_out(tmp_path: Path) -> None:
    calls: list[Any] = []

    def save_hook(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        calls.append(([type(model) for model in models], [sorted(state) for state in weights], folder))
        torch.save(weights.pop(0), os.path.join(folder, "mine.bin"))
        weights[0].pop("bias")

    def load_hook(models: list[nn.Module], folder: str) -> None:
        calls.append((len(models), folder))
        models.pop(0).load_state_dict(torch.load(os.path.join(folder, "mine.bin")))

    accelerator = enable(accelerator_for("plain"), DCPPlugin())
    net, head = accelerator.prepare(Net(), nn.Linear(3, 1))
    handles = accelerator.register_save_state_pre_hook(save_hook), accelerator.register_load_state_pre_hook(load_hook)
    path = tmp_path / "a"
    accelerator.save_state(str(path))
    names = [["inner.bias", "inner.weight", "outer.bias", "outer.weight", "seen"], ["bias", "weight"]]
    assert calls == [([Net, nn.Linear], names, str(path))]
    assert not (path / "pytorch_model_fsdp_1").exists(), "what a hook took out is not saved"

    saved = [{name: value.clone() for name, value in model.state_dict().items()} for model in (net, head)]
    for model in (net, head):
        for parameter in model.parameters():
            nn.init.ones_(parameter)
    with pytest.raises(PlanError, match=r"Missing key\(s\) of model 0: bias"):
        accelerator.load_state(str(path))
    accelerator.load_state(str(path), strict=False)
    assert calls[-1] == (2, str(path))
    assert same(net.state_dict(), saved[0])
    assert torch.equal(head.weight, saved[1]["weight"])
    assert torch.equal(head.bias, torch.ones(1)), "what a hook took out of the state dict is not there"

    handles[1].remove()
    with pytest.raises(PlanError, match="model 1 was not saved"):
        accelerator.load_state(str(path), strict=False)


def test_names_are_automatic_and_old_checkpoints_go_after_the_commit(tmp_path: Path) -> None:
    one = run("plain", folder=tmp_path, total_limit=2, plugin=DCPPlugin(keep_every=3))
    folder = tmp_path / "checkpoints"
    (folder / "notes_1").mkdir(parents=True)
    for _ in range(6):
        one.train(1)
        one.accelerator.save_state()
    assert sorted(os.listdir(folder)) == ["checkpoint_0", "checkpoint_3", "checkpoint_4", "checkpoint_5", "notes_1"]

    # A save that was killed: the number is used again, and older litter goes.
    (folder / "checkpoint_5" / ".metadata").unlink()
    (folder / "checkpoint_2" / "optimizer_0").mkdir(parents=True)
    (folder / "checkpoint_2" / "optimizer_0" / f"__0_0-{'0' * 32}.distcp").touch()
    other = run("plain", folder=tmp_path, total_limit=2, plugin=DCPPlugin(keep_every=3))
    with pytest.warns(UserWarning, match=r"newer ones are no good checkpoints: checkpoint_5 \(never committed\)"):
        other.accelerator.load_state()
    assert other.counter.counted == 5
    assert other.accelerator.save_iteration == 5
    other.accelerator.save_state()
    assert sorted(os.listdir(folder)) == ["checkpoint_0", "checkpoint_3", "checkpoint_4", "checkpoint_5", "notes_1"]
    assert newest_checkpoint(folder) == folder / "checkpoint_5"

    other.accelerator.project_configuration.iteration = 4
    with pytest.raises(ValueError, match=r"checkpoint_4 \(4\) already exists"):
        other.accelerator.save_state()


def test_the_next_number_is_known_however_the_path_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = run("plain", folder=tmp_path / "run")
    for _ in range(3):
        path = one.accelerator.save_state()
    (tmp_path / "run" / "kept_7").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for written, number in (("run/checkpoints/checkpoint_2", 3), ("run/kept_7", 0)):
        other = run("plain", folder=tmp_path / "run")
        other.accelerator.load_state(written)
        assert other.accelerator.save_iteration == number


def test_a_run_that_begins_again_beside_an_older_one_keeps_what_it_saves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = run("plain", folder=tmp_path, total_limit=2)
    for _ in range(4):
        one.accelerator.save_state()
    assert not caplog.records
    again = run("plain", folder=tmp_path, total_limit=2)
    for number in range(2):
        path = again.accelerator.save_state()
        assert sorted(os.listdir(path.parent)) == [f"checkpoint_{number}", "checkpoint_2", "checkpoint_3"]
        assert "lower number than checkpoint_3" in caplog.text
        caplog.clear()


def test_what_is_new_stays_beyond_the_limit(tmp_path: Path) -> None:
    one = run("plain", folder=tmp_path, total_limit=1, plugin=DCPPlugin(keep_newer_than_hours=1))
    for _ in range(3):
        one.accelerator.save_state()
    assert len(os.listdir(tmp_path / "checkpoints")) == 3
    # One that cannot say when it was saved stays, and hinders nothing.
    (tmp_path / "checkpoints" / "checkpoint_0" / ".metadata").write_bytes(b"no pickle")
    enable(one.accelerator, DCPPlugin())
    one.accelerator.save_state()
    assert os.listdir(tmp_path / "checkpoints") == ["checkpoint_3"]


def test_an_uncommitted_directory_is_refused_and_the_newest_committed_one_named(tmp_path: Path) -> None:
    one = run("plain")
    folder = tmp_path / "of a run"  # beside other tests' folders there may be checkpoints
    for number in (9, 10, 11):
        one.accelerator.save_state(folder / f"step_{number}")
    (folder / "step_11" / ".metadata").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"step_11, but it has no .metadata.*beside it is .*step_10"):
        one.accelerator.load_state(folder / "step_11")
    with pytest.raises(ValueError, match=r"step_12 but folder does not exist.*step_10"):
        one.accelerator.load_state(folder / "step_12")
    with pytest.raises(CheckpointNotFoundError, match="There is no checkpoint beside it"):
        one.accelerator.load_state(folder)


def test_a_killed_save_whose_hook_wrote_weights_is_not_taken_for_one_of_stocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run("plain", folder=tmp_path)
    one.accelerator.save_state()
    one.accelerator.register_save_state_pre_hook(lambda _, __, folder: Path(folder, "model.safetensors").touch())
    monkeypatch.setattr(FileSystemWriter, "finish", lambda *_: 1 // 0)
    monkeypatch.setattr(FileSystemWriter, "abandon", lambda *_: None)
    with pytest.raises(CheckpointException, match="ZeroDivisionError"):
        one.accelerator.save_state()
    folder = tmp_path / "checkpoints"
    assert newest_checkpoint(folder) == folder / "checkpoint_0"
    with pytest.raises(CheckpointNotFoundError, match=r"beside it is .*checkpoint_0"):
        one.accelerator.load_state(folder / "checkpoint_1")


def test_only_automatic_names_are_chosen_from_and_damaged_ones_are_skipped(tmp_path: Path) -> None:
    one = run("plain", folder=tmp_path)
    folder = tmp_path / "checkpoints"
    for _ in range(3):
        one.accelerator.save_state()
        one.counter.counted += 1
    shutil.copytree(folder / "checkpoint_0", folder / "backup_2024")
    (folder / "checkpoint_2" / ".metadata").write_bytes(b"no pickle")
    # Of stock's kind, and cut off.
    shutil.copytree(folder / "checkpoint_1", folder / "checkpoint_3")
    (folder / "checkpoint_3" / ".metadata").unlink()
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / "checkpoint_3" / part / ".metadata").write_bytes(b"")
    other = run("plain", folder=tmp_path)
    with pytest.warns(UserWarning, match=r"newer ones are no good checkpoints: checkpoint_2 .*, checkpoint_3 "):
        other.accelerator.load_state()
    assert other.counter.counted == 1
    (folder / "backup_2024").rename(tmp_path / "backup")
    with pytest.warns(UserWarning, match=r"no good checkpoints: checkpoint_2 .*, checkpoint_3 "):
        assert newest_checkpoint(folder) == folder / "checkpoint_1"


def test_ours_with_stocks_saved_over_it_is_refused_with_what_to_do(tmp_path: Path) -> None:
    one = run("plain")
    path = one.accelerator.save_state(tmp_path / "a")
    disable(one.accelerator)
    one.train(2)
    one.accelerator.save_state(str(path))
    shutil.copytree(path, tmp_path / "b")
    other = run("plain", seed=5)
    before = other.whole_state()
    with pytest.raises(PlanError, match=r"holds two checkpoints: ours, and, in optimizer\.bin, one of stock"):
        other.accelerator.load_state(path)
    assert same(other.whole_state(), before)
    write_stock_files(path)
    other.accelerator.load_state(path)
    assert other.counter.counted == 0
    disable(other.accelerator).load_state(str(tmp_path / "b"))
    assert same(other.whole_state(), one.whole_state())
    enable(other.accelerator, DCPPlugin()).save_state(tmp_path / "b")
    other.accelerator.load_state(tmp_path / "b")


class Phase(enum.Enum):
    """A class of the user's own."""

    WARM_UP = 1


class Config(dict[str, Any]):
    """A dict of the user's own class."""


class Log(list[Any]):
    """A list of the user's own class."""


@pytest.mark.parametrize("value", [Config(a=1), Log([1]), Log([torch.ones(1)])], ids=str)
def test_a_dict_or_list_of_a_users_class_is_warned_of_because_the_load_refuses_it(tmp_path: Path, value: Any) -> None:
    one = run("plain")
    one.counter.extra = {"it": value}
    name = type(value).__name__
    with pytest.warns(UnloadableValueWarning, match=rf"the registered object 0, a Counter.extra.it \(.*{name}\)"):
        one.accelerator.save_state(tmp_path / "a")
    with pytest.raises(UnsupportedValueError, match=name):
        run("plain").accelerator.load_state(tmp_path / "a")
    other = run("plain", plugin=DCPPlugin(safe_globals=(type(value),)))
    other.accelerator.load_state(tmp_path / "a")
    assert type(other.counter.extra["it"]) is type(value)


def test_objects_of_the_users_load_as_plain_data_unless_he_says_otherwise(tmp_path: Path) -> None:
    one = run("plain")
    one.counter.extra = {"path": Path("a/class"), "phase": Phase.WARM_UP}
    with pytest.warns(UnloadableValueWarning, match=r"the registered object 0, a Counter.extra.phase \(.*Phase\)"):
        one.accelerator.save_state(tmp_path / "a")
    for options, kwargs in (
        ({"weights_only": False}, {}),
        ({}, {"load_kwargs": {"weights_only": False}}),
        ({"safe_globals": (Phase,)}, {}),
        ({}, {"load_kwargs": {"safe_globals": [Phase]}}),
    ):
        other = run("plain", plugin=DCPPlugin(**options))
        other.accelerator.load_state(tmp_path / "a", **kwargs)
        assert other.counter.extra == one.counter.extra
    other = run("plain")
    with pytest.raises(UnsupportedValueError, match="(?s)registered object 0, a Counter, is no plain data.*Phase"):
        other.accelerator.load_state(tmp_path / "a")
    other.accelerator.register_for_checkpointing(Counter())
    with pytest.raises(RuntimeError, match="Expected the states of 2 registered objects"):
        other.accelerator.load_state(tmp_path / "a")


def test_files_for_stock_follow_the_checkpoint_that_is_saved_again(tmp_path: Path) -> None:
    one = run("plain")
    one.accelerator.register_for_checkpointing(Counter())
    one.accelerator.prepare(torch.optim.SGD(one.model.parameters()))
    path = one.accelerator.save_state(tmp_path / "a")
    assert (path / "optimizer_1").exists()
    assert (path / "custom_checkpoint_1.pkl").exists()
    one = run("plain", seed=2)
    one.train(1)
    one.accelerator.save_state(path)
    assert not (path / "custom_checkpoint_1.pkl").exists()
    assert not (path / "optimizer_1").exists()
    assert len(list(path.rglob("*.distcp"))) == 3, "data of the first save is gone, in the parts too"
    # As if it had been killed after the commit.
    (path / "pytorch_model_fsdp_0" / ".metadata").unlink()
    (path / "scheduler.bin").unlink()
    assert is_committed(path)
    write_stock_files(path)
    assert is_committed(path / "pytorch_model_fsdp_0")
    assert (path / "scheduler.bin").exists()


def test_a_stock_checkpoint_is_replaced_in_place_and_nothing_of_it_is_taken_for_ours(tmp_path: Path) -> None:
    stock = run("plain", plugin=None)
    stock.train(1)
    stock.accelerator.save_state(str(tmp_path / "a"))
    before = stock.whole_state()
    failing = run("plain", seed=4)
    failing.accelerator.register_save_state_pre_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failing.accelerator.save_state(tmp_path / "a")
    other = run("plain", seed=5)
    other.accelerator.load_state(tmp_path / "a")
    assert same(other.whole_state(), before), "until ours is committed, stock's is there"
    other.train(1)
    other.accelerator.save_state(tmp_path / "a")
    again = run("plain", seed=6)
    again.accelerator.load_state(tmp_path / "a")
    assert same(again.whole_state(), other.whole_state())
    with pytest.raises(FileNotFoundError, match=r"optimizer\.bin"):
        run("plain", plugin=None).accelerator.load_state(str(tmp_path / "a"))


def test_what_does_not_fit_is_said_before_anything_is_changed(tmp_path: Path) -> None:
    one = run("plain")
    one.accelerator.save_state(tmp_path / "a")
    with pytest.raises(TypeError, match="found offload too"):
        one.accelerator.load_state(tmp_path / "a", offload=True)
    with pytest.raises(ValueError, match="found the URL 's3://bucket/a'"):
        one.accelerator.save_state("s3://bucket/a")
    with pytest.raises(ValueError, match="needs output_dir"):
        one.accelerator.save_state()
    with pytest.raises(ValueError, match="needs input_dir"):
        one.accelerator.load_state()
    one.accelerator.project_configuration.automatic_checkpoint_naming = True
    with pytest.raises(ValueError, match="needs project_dir"):
        one.accelerator.save_state()
    changed = run("plain", seed=2)
    before = changed.whole_state()
    changed.accelerator.prepare(torch.optim.lr_scheduler.StepLR(changed.optimizer.optimizer, 1))
    changed.accelerator.register_for_checkpointing(Counter())
    disable(one.accelerator).project_configuration.automatic_checkpoint_naming = False
    one.accelerator.save_state(str(tmp_path / "stock"))
    for path in (tmp_path / "a", tmp_path / "stock"):
        with pytest.raises(
            PlanError, match=rf"scheduler_1\.bin in {path}, .* of 2 registered objects in {path}, found 1"
        ):
            changed.accelerator.load_state(path)
    with pytest.raises(TypeError, match="map_location must be None, 'cpu' or 'on_device', got 'cuda:0'"):
        changed.accelerator.load_state(tmp_path / "a", map_location="cuda:0")
    assert same(changed.whole_state(), before)
    other = enable(accelerator_for("plain"), DCPPlugin())
    model = other.prepare(nn.Linear(2, 2))
    other.register_for_checkpointing(Counter())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PlanError, match=r"Missing key\(s\) of model 0: bias, weight. Unexpected key"):
        other.load_state(tmp_path / "a")
    assert same(model.state_dict(), before)
    failing = run("plain")
    failing.accelerator.register_save_state_pre_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failing.accelerator.save_state(tmp_path / "b")
    assert not is_committed(tmp_path / "b")
    failing = run("plain")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "optimizer_0").touch()
    with pytest.raises(CheckpointException, match="optimizer_0"):
        failing.accelerator.save_state(tmp_path / "c")


@pytest.mark.parametrize("name", ["../outside.bin", "/tmp/outside.bin", ".metadata", "a/b.pkl"])
def test_file_names_in_a_checkpoint_cannot_lead_out_of_it(tmp_path: Path, name: str) -> None:
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save({"accelerate": {"0": {name: b"harm"}}}, checkpoint_id=tmp_path / "a")
    with pytest.raises(UnsafeCheckpointError, match="expected the name of a file"):
        run("plain").accelerator.load_state(tmp_path / "a")
    with pytest.raises(UnsafeCheckpointError, match="expected the name of a file"):
        write_stock_files(tmp_path / "a")
    assert not (tmp_path / "outside.bin").exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save({"model": {"w": torch.ones(2)}}, checkpoint_id=tmp_path / "a")
    with pytest.raises(PlanError, match="Expected a checkpoint of Accelerate"):
        run("plain").accelerator.load_state(tmp_path / "a")


def test_the_plugin_is_switched_off_and_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = accelerator_for("plain")
    stock = accelerator.save_state
    assert enable(accelerator, DCPPlugin()) is accelerator
    enable(accelerator, DCPPlugin(asynchronous="thread"))
    assert accelerator._dcp_plugins_checkpointer.plugin.asynchronous == "thread"
    assert disable(accelerator) is accelerator
    assert accelerator.save_state == stock
    assert disable(accelerator) is accelerator
    enable(accelerator, DCPPlugin(asynchronous="thread"))
    (model,) = [accelerator.prepare(nn.Linear(2, 2))]
    accelerator.save_state(tmp_path / "a")
    assert accelerator.free_memory(model) == [None]
    assert is_committed(tmp_path / "a")
    assert accelerator._models == []
    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, "finish", lambda *_: 1 // 0)
        accelerator.save_state(tmp_path / "b")
        accelerator._dcp_plugins_checkpointer._saver.wait()
    with pytest.raises(CheckpointException, match="ZeroDivisionError"):
        enable(accelerator, DCPPlugin(thread_count=1))
    assert accelerator._dcp_plugins_checkpointer.plugin == DCPPlugin(thread_count=1)
    accelerator.state.__dict__["distributed_type"] = "DEEPSPEED"
    with pytest.raises(ValueError, match="whose checkpoints are its own"):
        enable(accelerator, DCPPlugin())


def test_a_subclass_whose_own_save_would_no_longer_be_called_is_refused() -> None:
    class Mine(Accelerator):
        def save_state(self, *args: Any, **kwargs: Any) -> Any:
            return super().save_state(*args, **kwargs)

    accelerator = Mine(cpu=True)
    with pytest.raises(ValueError, match="Mine has its own save_state, which enable"):
        enable(accelerator, DCPPlugin())
    assert "save_state" not in vars(accelerator)


def test_another_accelerate_is_refused_in_one_line() -> None:
    accelerator = accelerator_for("plain")
    del accelerator._custom_objects
    with pytest.raises(MissingExtraError, match=r"misses Accelerator\._custom_objects\. Install") as caught:
        enable(accelerator, DCPPlugin())
    assert "\n" not in str(caught.value)
