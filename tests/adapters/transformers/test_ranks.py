"""DDP and FSDP, each as the Trainer and Accelerate set them up, on two ranks; and what is read under another."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from transformers import GPT2LMHeadModel, TrainerCallback

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointException
from dcp_plugins.testing.ranks import run_ranks
from dcp_plugins.transformers import DCPCallback, last_checkpoint
from tests.adapters.transformers.trainers import (
    Digests,
    StopAt,
    checkpoints,
    digest,
    files,
    fit,
    fsdp,
    outcome,
)

OURS = [".metadata", "data", "trainer_state.json"]
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp1": "FullyShardedDataParallel", "fsdp2": "FSDPGPT2LMHeadModel"}


def options_of(flavour: str) -> dict[str, Any]:
    # The flags and the wrapped state are each rank's own, so this is called there.
    return {"fsdp1": lambda: fsdp(1), "fsdp2": lambda: fsdp(2)}.get(flavour, dict)()


def stop_and_resume(flavour: str, folder: Path) -> dict[str, Any]:
    """Compare a run that is stopped and resumed with one that is not, and tell what there was on the way."""
    options = options_of(flavour)
    whole = outcome(fit(folder / "whole", save_strategy="no", **options))
    first = fit(folder, StopAt(6), DCPCallback(asynchronous="thread"), save_total_limit=2, **options)
    found = {
        "wrapper": type(first.model_wrapped).__name__,
        "kept": checkpoints(folder),
        "files": files(folder / "checkpoint-6"),
    }
    seen = Digests()
    resumed = fit(folder, seen, DCPCallback(hf_weights=True), resume=True, **options)
    return {**found, "same": outcome(resumed) == whole, "loaded": seen.begun_with, "weights": digest(resumed.model)}


def load(flavour: str, checkpoint: Path) -> dict[str, str]:
    """Return the weights and the optimizer's state that a run begins with."""
    seen = Digests()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The random states were saved by")
        fit(
            checkpoint.parent,
            StopAt(7),
            seen,
            DCPCallback(),
            resume=checkpoint,
            save_strategy="no",
            **options_of(flavour),
        )
    return seen.begun_with


@pytest.mark.parametrize(("flavour", "others"), [("ddp", ["fsdp1", "fsdp2"]), ("fsdp1", ["fsdp2"]), ("fsdp2", ["ddp"])])
def test_a_run_resumes_exactly_and_loads_under_others(tmp_path: Path, flavour: str, others: list[str]) -> None:
    story = run_ranks(2, stop_and_resume, flavour, tmp_path, timeout_seconds=120)[0]
    assert story["same"], "loss, gradient norm and weights are those of the run that never stopped, bit for bit"
    assert story["wrapper"] == WRAPPERS[flavour]
    assert story["kept"] == ["checkpoint-4", "checkpoint-6"]
    assert story["files"] == OURS
    assert digest(GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-8")) == story["weights"]
    for other in others:
        assert run_ranks(2, load, other, tmp_path / "checkpoint-6", timeout_seconds=60)[0] == story["loaded"]
    assert load("alone", tmp_path / "checkpoint-6") == story["loaded"]


def best_at_the_end(flavour: str, folder: Path) -> tuple[bool, bool]:
    scores = iter((0.1, 0.9, 0.2, 0.3))
    seen = Digests()
    runner = fit(
        folder,
        seen,
        DCPCallback(asynchronous="thread"),
        parts={"compute_metrics": lambda prediction: {"score": next(scores)}},
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="score",
        load_best_model_at_end=True,
        save_total_limit=1,
        **options_of(flavour),
    )
    return digest(runner.model) == seen.at[4], seen.at[4] != seen.at[8]


def test_the_best_sharded_weights_are_loaded_at_the_end(tmp_path: Path) -> None:
    assert run_ranks(2, best_at_the_end, "fsdp2", tmp_path, timeout_seconds=60) == [(True, True)] * 2
    assert checkpoints(tmp_path) == ["checkpoint-4"]


class Terminated(TrainerCallback):
    """Asks this process to end, as a scheduler does, and gives it time to notice."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)


def stop_in_time(folder: Path) -> int:
    # The Trainer waits three seconds for a SIGKILL before it believes that there is time for a save.
    options = {"save_strategy": "no", "enable_jit_checkpoint": True, "max_steps": 400}
    return fit(folder, Terminated(), DCPCallback(asynchronous="thread"), **options).state.global_step


def test_the_trainers_own_save_at_sigterm_goes_the_same_way(tmp_path: Path) -> None:
    (step,) = run_ranks(1, stop_in_time, tmp_path, timeout_seconds=60)
    assert 1 < step < 400
    newest = last_checkpoint(tmp_path)
    assert newest is not None
    assert files(newest) == OURS


def fail_on_rank_1(folder: Path) -> tuple[str, int]:
    """Train until rank 1 cannot write any more, then resume; return the error and the step that was gone on from."""
    write = dcp.FileSystemWriter.write_data

    def fail(self: Any, plan: Any, planner: Any) -> Any:
        if self.path.name == "checkpoint-4" and dist.get_rank() == 1:
            raise OSError("no space left on this device")
        return write(self, plan, planner)

    dcp.FileSystemWriter.write_data = fail
    message = ""
    try:
        fit(folder, DCPCallback(asynchronous="thread"), save_total_limit=1)
    except CheckpointException as exc:
        message = str(exc)
    dcp.FileSystemWriter.write_data = write
    newest = last_checkpoint(folder) if dist.get_rank() == 0 else None
    dist.barrier()
    fit(folder, DCPCallback(asynchronous="thread"), resume=True, save_total_limit=1)
    return message, -1 if newest is None else int(newest.name.removeprefix("checkpoint-"))


def disagree(folder: Path) -> tuple[int, str]:
    """Resume where rank 1 sees no checkpoint yet; and train as if each rank were a node that wants its own files."""
    fit(folder, StopAt(2), DCPCallback(), max_steps=4)
    resumed = fit(folder, DCPCallback(), resume=True if dist.get_rank() == 0 else None, max_steps=4)
    os.environ |= {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    try:
        fit(folder, DCPCallback(), save_on_each_node=True)
    except ValueError as exc:
        return resumed._initial_global_step, str(exc)
    return resumed._initial_global_step, ""


def test_rank_0_chooses_for_all_and_nodes_with_folders_of_their_own_are_refused(tmp_path: Path) -> None:
    for begun_at, refusal in run_ranks(2, disagree, tmp_path, timeout_seconds=60):
        assert begun_at == 2
        assert "this Trainer uses save_on_each_node=True on several nodes" in refusal


def test_a_rank_that_cannot_write_stops_all_and_nothing_is_lost(tmp_path: Path) -> None:
    results = run_ranks(2, fail_on_rank_1, tmp_path, timeout_seconds=60)
    assert all("rank(s) failed: 1" in message and "no space left" in message for message, _ in results)
    assert results[0][1] == 2
    assert checkpoints(tmp_path) == ["checkpoint-8"]
