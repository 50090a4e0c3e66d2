"""A stock Trainer with a `DCPCallback`, in one process: saving, resuming, keeping and choosing checkpoints."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointException, UnloadableValueWarning, UnsafeCheckpointError
from dcp_plugins.manager import SaveOptions, Saver
from dcp_plugins.transformers import DCPCallback, last_checkpoint
from tests.adapters.transformers.trainers import (
    STEPS,
    Counting,
    Digests,
    Quiet,
    StopAt,
    checkpoints,
    die_at_the_commit,
    digest,
    files,
    fit,
    losses,
    outcome,
    tiny,
    trainer,
)

OURS = [".metadata", "data", "trainer_state.json"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the run that never stops comes to."""
    return outcome(fit(tmp_path_factory.mktemp("whole"), save_strategy="no"))


@pytest.mark.parametrize("asynchronous", ["off", "thread", "process"])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path, whole: Any, asynchronous: Any) -> None:
    fit(tmp_path, StopAt(6), DCPCallback(asynchronous=asynchronous))
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert files(tmp_path / "checkpoint-6") == OURS, "the Trainer's own writers have written nothing"
    for resume in (True, tmp_path / "checkpoint-4"):
        runner = fit(tmp_path, DCPCallback(SaveOptions(asynchronous=asynchronous)), resume=resume)
        assert outcome(runner) == whole


def test_callbacks_states_are_saved_and_restored(tmp_path: Path) -> None:
    fit(tmp_path, StopAt(4), Counting(), Counting(100), DCPCallback(asynchronous="thread"))
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert [one["attributes"]["count"] for one in saved["Counting"]] == [4, 104]
    assert saved["TrainerControl"]["args"]["should_training_stop"] is True
    runner = trainer(
        tmp_path, Counting(), Counting(), DCPCallback(), restore_callback_states_from_checkpoint=True, max_steps=6
    )
    runner.train(resume_from_checkpoint=True)
    counts = [one.count for one in runner.callback_handler.callbacks if isinstance(one, Counting)]
    assert counts == [6, 106]


def test_gradient_accumulation_and_epochs_resume_exactly(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 3,
        "max_steps": -1,
        "save_strategy": "epoch",
    }
    expected = outcome(fit(tmp_path / "whole", **{**options, "save_strategy": "no"}))
    fit(tmp_path / "run", StopAt(6), DCPCallback(asynchronous="thread"), **options)
    assert checkpoints(tmp_path / "run") == ["checkpoint-4", "checkpoint-6"], (
        "4 steps are an epoch; stopped in the next"
    )
    # From an epoch's end, and from its middle.
    for step in (4, 6):
        resumed = fit(tmp_path / "run", DCPCallback(), resume=tmp_path / "run" / f"checkpoint-{step}", **options)
        assert outcome(resumed) == expected


def test_ignore_data_skip_begins_the_data_anew(tmp_path: Path, whole: Any) -> None:
    fit(tmp_path, StopAt(2), DCPCallback())
    runner = fit(tmp_path, DCPCallback(), resume=True, ignore_data_skip=True)
    assert losses(runner).keys() == whole[0].keys()
    assert losses(runner)[2] == whole[0][2]
    assert losses(runner)[3] != whole[0][3]


def scored(*scores: float) -> dict[str, Any]:
    """Return parts of a Trainer that evaluates to these scores, one after the other."""
    remaining: Iterator[float] = iter(scores)
    return {"compute_metrics": lambda prediction: {"score": next(remaining)}}


BEST: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "score"}


@pytest.mark.parametrize("asynchronous", ["off", "thread"])
def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(tmp_path: Path, asynchronous: Any) -> None:
    seen = Digests()
    runner = fit(
        tmp_path,
        seen,
        DCPCallback(asynchronous=asynchronous),
        parts=scored(0.1, 0.9, 0.2, 0.3),
        save_total_limit=1,
        load_best_model_at_end=True,
        greater_is_better=True,
        **BEST,
    )
    assert runner.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert digest(runner.model) == seen.at[4] != seen.at[8]
    assert checkpoints(tmp_path) == ["checkpoint-4"], (
        "with a limit of one the Trainer deletes all but the best, at the end"
    )


def test_a_kill_while_the_trainer_deletes_all_but_the_best_leaves_nothing_to_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def killed(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name != "checkpoint-8":
            remove(path, *args, **kwargs)
            return
        # The order of the files in a directory is anybody's: here the worst.
        for file in [*Path(path).glob(".metadata"), *Path(path).glob("*.distcp")]:
            file.unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(
            tmp_path,
            DCPCallback(hf_weights=True),
            parts=scored(0.1, 0.9, 0.2, 0.3),
            save_total_limit=1,
            greater_is_better=True,
            **BEST,
        )
    monkeypatch.undo()
    assert "model.safetensors" in files(tmp_path / "checkpoint-8"), "what the stock loader would resume from"
    with pytest.warns(UserWarning, match="Skipped .*checkpoint-8"):
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_what_cannot_be_deleted_is_logged_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remove = shutil.rmtree

    def refuse(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name == "checkpoint-2":
            raise OSError("device or resource busy")
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    # In the foreground, where an error of rank 0 alone would leave the others waiting for it.
    fit(tmp_path, DCPCallback(), save_total_limit=1, max_steps=4)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert "device or resource busy" in caplog.text


def test_save_strategy_best_saves_what_is_better_and_the_limit_spares_best_and_newest(tmp_path: Path) -> None:
    runner = fit(
        tmp_path,
        DCPCallback(asynchronous="thread"),
        parts=scored(0.4, 0.3, 0.5, 0.2),
        save_strategy="best",
        greater_is_better=False,
        save_total_limit=2,
        **BEST,
    )
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-8"]
    assert runner.state.best_model_checkpoint == str(tmp_path / "checkpoint-8")
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert (saved["best_metric"], saved["best_global_step"]) == (0.2, 8)


def test_the_limit_deletes_the_oldest_but_the_best(tmp_path: Path) -> None:
    fit(
        tmp_path,
        DCPCallback(),
        parts=scored(0.9, 0.1, 0.1, 0.1),
        greater_is_better=True,
        save_total_limit=2,
        **BEST,
    )
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-8"]


@pytest.mark.parametrize("asynchronous", ["off", "thread"])
def test_a_failed_save_deletes_nothing_and_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: Any
) -> None:
    commit = dcp.FileSystemWriter.finish
    num_commits = 0

    def commit_once(*args: Any, **kwargs: Any) -> None:
        nonlocal num_commits
        num_commits += 1
        (commit if num_commits == 1 else die_at_the_commit)(*args, **kwargs)

    monkeypatch.setattr(dcp.FileSystemWriter, "finish", commit_once)
    with pytest.raises(CheckpointException, match="no space left"):
        fit(tmp_path, DCPCallback(asynchronous=asynchronous), save_total_limit=1)
    monkeypatch.undo()
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
    with pytest.warns(UserWarning, match="Skipped .*checkpoint-4"):
        fit(tmp_path, DCPCallback(asynchronous=asynchronous), resume=True, save_total_limit=1)
    assert checkpoints(tmp_path) == ["checkpoint-8"]


def test_save_only_model_holds_no_more_and_resumes_with_a_warning(tmp_path: Path) -> None:
    fit(tmp_path, StopAt(2), DCPCallback(), save_only_model=True)
    saved = dcp.load_from_keys(checkpoint_id=tmp_path / "checkpoint-2")
    assert saved.keys() == {"model", "trainer"}
    assert saved["trainer"].keys() == {"state"}
    with pytest.warns(UserWarning, match="saved with save_only_model"):
        runner = fit(tmp_path, DCPCallback(), resume=True)
    assert losses(runner).keys() == set(range(1, STEPS + 1))


def test_with_hf_weights_a_checkpoint_is_loaded_by_from_pretrained(tmp_path: Path) -> None:
    seen = Digests()
    fit(tmp_path, seen, DCPCallback(asynchronous="thread", hf_weights=True), max_steps=4)
    for step in (2, 4):
        path = tmp_path / f"checkpoint-{step}"
        assert {*OURS, "config.json", "model.safetensors", "training_args.bin"} <= set(files(path))
        assert digest(GPT2LMHeadModel.from_pretrained(path)) == seen.at[step]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_from_pretrained_loads_what_the_safetensors_writer_wrote(tmp_path: Path) -> None:
    model = tiny()
    state = model.state_dict()
    mapping = {name: 1 + number % 2 for number, name in enumerate(state)}
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(tmp_path, mapping))
    model.config.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_other_trainers_of_the_process_are_left_alone(tmp_path: Path, whole: Any) -> None:
    DCPCallback()
    fit(tmp_path, StopAt(6))
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(
        files(tmp_path / "checkpoint-6")
    )
    assert outcome(fit(tmp_path, resume=True)) == whole


class Announcing(Trainer):
    """A subclass that adds to a save, as TRL's do."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        (Path(self.args.output_dir) / f"announced-{self.state.global_step}").touch()
        super()._save_checkpoint(model, trial)


class Own(Trainer):
    """A subclass that saves in its own way."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        torch.save(model.state_dict(), Path(self.args.output_dir) / "mine.pt")


def test_a_subclass_that_calls_super_is_served_and_one_that_does_not_is_told(tmp_path: Path) -> None:
    fit(tmp_path, DCPCallback(), kind=Announcing, max_steps=2)
    assert (tmp_path / "announced-2").exists()
    assert files(tmp_path / "checkpoint-2") == OURS
    with pytest.raises(RuntimeError, match="step 2 did not go through Trainer._save_checkpoint.*call super"):
        fit(tmp_path / "own", DCPCallback(), kind=Own)


class FreshOptimizer(Quiet):
    """A subclass that loads only what the stock Trainer writes."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        assert checkpoint is None or not Path(checkpoint, "optimizer.pt").exists()


def test_an_optimizer_that_a_subclass_does_not_load_is_told_of(tmp_path: Path) -> None:
    fit(tmp_path, StopAt(2), DCPCallback())
    with pytest.warns(UserWarning, match=r"optimizer's state in .*checkpoint-2 was not loaded.*call super"):
        fit(tmp_path, DCPCallback(), resume=True, kind=FreshOptimizer)


class Interrupt(TrainerCallback):
    """Presses Ctrl-C once."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            # A shell that starts the tests in the background makes them ignore SIGINT.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.raise_signal(signal.SIGINT)


def test_an_interrupted_trainer_trains_again_in_the_same_process(tmp_path: Path, whole: Any) -> None:
    runner = trainer(tmp_path, Interrupt())
    runner.add_callback(DCPCallback(asynchronous="thread"))
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4", "the save in flight has come to its end"
    runner.remove_callback(Interrupt)
    for resume in (True, str(tmp_path / "checkpoint-6")):
        runner.train(resume_from_checkpoint=resume)
        assert outcome(runner) == whole


def test_two_callbacks_in_one_trainer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one DCPCallback"):
        fit(tmp_path, DCPCallback(), DCPCallback())


def test_options_are_checked_when_the_callback_is_made() -> None:
    with pytest.raises(ValueError, match="asynchronous must be one of"):
        DCPCallback(asynchronous="yes")
    callback = DCPCallback(SaveOptions(asynchronous="thread", thread_count=2), sync_files=False)
    assert callback.options == SaveOptions(asynchronous="thread", thread_count=2, sync_files=False)


class Moded(torch.optim.SGD):
    """Changes parameters between evaluation and training, as schedule-free optimizers do."""

    is_training = True

    def train(self) -> None:
        self._switch(True)

    def eval(self) -> None:
        self._switch(False)

    @torch.no_grad()
    def _switch(self, is_training: bool) -> None:
        if is_training != self.is_training:
            for parameter in self.param_groups[0]["params"]:
                parameter.neg_()
        self.is_training = is_training


class Clones(TrainerCallback):
    def __init__(self) -> None:
        self.at: dict[int, dict[str, torch.Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = {name: value.clone() for name, value in kwargs["model"].state_dict().items()}


def test_what_an_optimizer_changes_after_an_evaluation_does_not_reach_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Saver.save
    overlapped: list[list[Any]] = []

    def watched(self: Saver, *args: Any, optimizers: Any, **kwargs: Any) -> None:
        overlapped.append(list(optimizers))
        save(self, *args, optimizers=optimizers, **kwargs)

    monkeypatch.setattr(Saver, "save", watched)
    clones = Clones()
    runner = trainer(tmp_path, clones, DCPCallback(asynchronous="thread"), eval_strategy="steps", eval_steps=2)
    runner.optimizer = Moded(runner.model.parameters(), lr=0.1)
    runner.train()
    assert clones.at.keys() == {2, 4, 6, 8}
    # Whether a copy that goes on beside training would be torn is a matter of luck with a model this small.
    assert overlapped == [[], [], [], []]
    for step, weights in clones.at.items():
        saved = dcp.load_from_keys("model", checkpoint_id=tmp_path / f"checkpoint-{step}")["model"]
        assert all(torch.equal(saved[name], value) for name, value in weights.items())


class Note(dict[str, Any]):
    """A dict of a user's class, which is not plain data."""


class Annotated(torch.optim.lr_scheduler.ConstantLR):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "note": Note()}


def annotated(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    runner = trainer(folder, *callbacks)
    optimizer = torch.optim.AdamW(runner.model.parameters())
    runner.optimizer, runner.lr_scheduler = optimizer, Annotated(optimizer)
    return runner


def test_a_schedulers_pickle_is_loaded_on_explicit_request_alone(tmp_path: Path) -> None:
    with pytest.warns(UnloadableValueWarning, match=r"scheduler.note \(.*Note\).*DCPCallback"):
        annotated(tmp_path, StopAt(2), DCPCallback()).train()
    with pytest.raises(UnsafeCheckpointError, match=r"trainer.scheduler: .*Note.*DCPCallback\(weights_only=False\)"):
        annotated(tmp_path, DCPCallback()).train(resume_from_checkpoint=True)
    for callback in (DCPCallback(weights_only=False), DCPCallback(safe_globals=[Note])):
        runner = annotated(tmp_path, callback)
        runner.train(resume_from_checkpoint=True)
        assert isinstance(runner.lr_scheduler.note, Note)
