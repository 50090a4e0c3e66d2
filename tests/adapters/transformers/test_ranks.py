"""DDP and FSDP, each as the Trainer and Accelerate set them up, on two ranks; and what is read on other numbers."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2LMHeadModel

from dcp_plugins.errors import CheckpointException
from dcp_plugins.testing.ranks import run_ranks
from dcp_plugins.transformers import DCPCallback
from tests.adapters.transformers.trainers import (
    Digests,
    StopAt,
    checkpoints,
    die_at_the_commit,
    digest,
    files,
    fit,
    fsdp,
    losses,
    outcome,
)

OURS = [".metadata", "data", "trainer_state.json"]


def under(flavour: str) -> dict[str, Any]:
    return {"ddp": {}, "fsdp1": fsdp(1), "fsdp2": fsdp(2)}[flavour] if flavour != "alone" else {}


def options_of(flavour: str) -> dict[str, Any]:
    if flavour == "fsdp1":
        return fsdp(1)
    if flavour == "fsdp2":
        return fsdp(2)
    return {}


def interrupted_and_whole(flavour: str, folder: Path) -> tuple[bool, list[str], dict[str, str], list[str]]:
    """Compare a run that is stopped and resumed with one that is not."""
    options = options_of(flavour)
    whole = outcome(fit(folder / "whole", save_strategy="no", **options))
    seen = Digests()
    first = fit(folder / "run", StopAt(6), seen, DCPCallback(asynchronous="thread"), save_total_limit=2, **options)
    kept = checkpoints(folder / "run")
    resumed = fit(folder / "run", DCPCallback(hf_weights=True), resume=True, **options)
    assert isinstance(seen.at[6], dict)
    return outcome(resumed) == whole, kept, seen.at[4], [type(first.model_wrapped).__name__, *files(folder / "run/checkpoint-6")]


def loaded(folder: Path, flavour: str) -> tuple[dict[str, str], dict[int, Any]]:
    """Load checkpoint 4 into a run that stops at once, and train on from it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The random states were saved by")
        runner = fit(folder, StopAt(5), DCPCallback(), resume=folder / "checkpoint-4", save_strategy="no", **options_of(flavour))
        return digest(runner.model), losses(runner)


@pytest.mark.parametrize(
    ("flavour", "wrapper"),
    [("ddp", "DistributedDataParallel"), ("fsdp1", "FullyShardedDataParallel"), ("fsdp2", "FSDPGPT2LMHeadModel")],
)
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path, flavour: str, wrapper: str) -> None:
    for same, kept, _, found in run_ranks(2, interrupted_and_whole, flavour, tmp_path, timeout_seconds=120):
        assert same
        assert kept == ["checkpoint-4", "checkpoint-6"]
        assert found == [wrapper, *OURS]
    assert digest(GPT2LMHeadModel.from_pretrained(tmp_path / "run" / "checkpoint-8"))
