"""Subclasses of Trainer that override its writers: a checkpoint has their files, and the weights only once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_plugins.testing.ranks import run_ranks
from dcp_plugins.transformers import DCPCallback, last_checkpoint
from tests.adapters.transformers.trainers import Quiet, StopAt, files, fit, fsdp, outcome

OURS = [".metadata", "data", "trainer_state.json"]


class Adding(Quiet):
    """Writes a file of its own in each of the three writers, after `Trainer`'s, and reads one of them again."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self.add(output_dir, "model.txt")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        self.add(output_dir, "weights.txt")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.add(output_dir, "optimizer.txt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self.read = None if checkpoint is None else Path(checkpoint, "optimizer.txt").read_text()

    def add(self, output_dir: str | None, name: str) -> None:
        if self.args.should_save:
            assert output_dir is not None
            Path(output_dir, name).write_text(f"{self.state.global_step}")


ADDED = ["model.txt", "optimizer.txt", "weights.txt"]


@pytest.mark.parametrize("asynchronous", ["off", "thread"])
def test_what_overridden_writers_add_is_in_the_checkpoint_and_the_weights_are_written_once(
    tmp_path: Path, asynchronous: Any
) -> None:
    expected = outcome(fit(tmp_path / "whole", save_strategy="no", max_steps=4))
    runner = fit(tmp_path, StopAt(2), DCPCallback(asynchronous=asynchronous), kind=Adding, max_steps=4)
    assert files(tmp_path / "checkpoint-2") == sorted([*OURS, *ADDED])
    runner.save_model(str(tmp_path / "final"))
    assert {"model.safetensors", "model.txt", "weights.txt"} <= set(files(tmp_path / "final"))
    resumed = fit(tmp_path, DCPCallback(asynchronous=asynchronous), resume=True, kind=Adding, max_steps=4)
    assert outcome(resumed) == expected
    assert resumed.read == "2"


def test_with_hf_weights_and_with_save_only_model_the_same_writers_are_called_as_without_a_callback(
    tmp_path: Path,
) -> None:
    fit(tmp_path, DCPCallback(hf_weights=True), kind=Adding, max_steps=2)
    assert {*OURS, *ADDED, "model.safetensors", "config.json"} <= set(files(tmp_path / "checkpoint-2"))
    fit(tmp_path / "only", DCPCallback(), kind=Adding, max_steps=2, save_only_model=True)
    assert files(tmp_path / "only" / "checkpoint-2") == sorted([*OURS, "model.txt", "weights.txt"])


class Whole(Quiet):
    """Writes everything itself, under the Trainer's names."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        torch.save(self.model.state_dict(), Path(output_dir or "", "pytorch_model.bin"))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        torch.save(self.optimizer.state_dict(), Path(output_dir, "optimizer.pt"))


def test_a_writer_that_writes_the_weights_itself_is_called_and_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Whole\._save writes the weights itself") as told:
        fit(tmp_path, StopAt(4), DCPCallback(), kind=Whole)
    assert len(told) == 1
    assert files(tmp_path / "checkpoint-2") == sorted([*OURS, "optimizer.pt", "pytorch_model.bin"])
    with warnings.catch_warnings(action="error"):
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4", "it is not taken for one of the stock Trainer"
    with pytest.warns(UserWarning, match=r"Whole\._save writes"):
        resumed = fit(tmp_path, DCPCallback(), resume=True, kind=Whole)
    assert outcome(resumed) == outcome(fit(tmp_path / "whole", save_strategy="no"))


class Editing(Quiet):
    """Changes what `Trainer` has written, and keeps random states of its own."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        Path(output_dir or "", "config.json").rename(Path(output_dir or "", "edited.json"))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)


def test_a_writer_that_fails_or_is_not_called_is_named_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Editing") as told:
        fit(tmp_path, DCPCallback(), kind=Editing, max_steps=4)
    messages = sorted(str(one.message) for one in told)
    assert len(messages) == 2
    assert "Editing._save failed, and the checkpoints do not have what it writes" in messages[0]
    assert "DCPCallback(hf_weights=True)" in messages[0]
    assert "Editing._save_rng_state is not called" in messages[1]
    with pytest.warns(UserWarning, match="_save_rng_state"):
        fit(tmp_path / "weights", DCPCallback(hf_weights=True), kind=Editing, max_steps=2)
    assert (tmp_path / "weights" / "checkpoint-2" / "edited.json").exists()


def under_fsdp(folder: Path) -> None:
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        fit(folder / kind, DCPCallback(), kind=Adding, max_steps=2, **fsdp(2, state_dict_type=kind))


def test_under_fsdp_the_same_writers_are_called_as_without_a_callback(tmp_path: Path) -> None:
    run_ranks(2, under_fsdp, tmp_path)
    sharded, full = (files(tmp_path / kind / "checkpoint-2") for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"))
    # The stock Trainer calls `_save` under FSDP only for whole weights.
    assert sharded == sorted([*OURS, "model.txt", "optimizer.txt"])
    assert full == sorted([*OURS, *ADDED])


def test_the_first_save_says_how_from_pretrained_can_load_a_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path / "told", DCPCallback(), max_steps=4)
    hints = [one.getMessage() for one in caplog.records if "from_pretrained cannot load it" in one.getMessage()]
    assert len(hints) == 1
    assert "DCPCallback(hf_weights=True)" in hints[0]
    caplog.clear()
    for chosen in (True, False):
        fit(tmp_path / f"{chosen}", DCPCallback(hf_weights=chosen), max_steps=2)
    assert "from_pretrained" not in caplog.text
