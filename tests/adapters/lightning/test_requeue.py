"""SLURM's auto-requeue, for real but for the scheduler: a script in its place records what ``scontrol`` is asked."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import textwrap
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from dcp_plugins.lightning import is_committed
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.trainers import fit
from tests.programs import run_program

# Each step waits for a file, so that the signal comes in the midst of a known step, on one rank alone.
PROGRAM = """
    import os, sys, time, warnings
    from pathlib import Path

    warnings.filterwarnings("ignore", module="lightning")
    import lightning.pytorch as pl
    import torch
    import dcp_plugins.lightning

    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    rank = int(os.environ["SLURM_PROCID"])

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(4, 4)

        def training_step(self, batch, index):
            print("step", self.global_step, flush=True)
            if self.global_step == 2:
                (folder / f"in-step-2-{rank}").write_text(str(os.getpid()))
                while not (folder / "go").exists():
                    time.sleep(0.01)
            return self.net(torch.ones(2, 4)).square().sum()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    class Every(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(folder / f"step-{trainer.global_step}.ckpt")

    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="dcp_fsdp2_async", max_steps=steps, default_root_dir=folder,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, callbacks=[Every()],
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.zeros(100, 1)))
"""

SCONTROL = """\
#!/bin/sh
# What is committed when the scheduler hears of it.
echo "$@" $(cd "$FOLDER" && ls -d hpc_ckpt_*/.metadata) >> "$FOLDER/scontrol.log"
"""


def train(folder: Path, steps: int) -> list[Future[subprocess.CompletedProcess[str]]]:
    """Begin to train on two ranks, each in the environment of a task of SLURM's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "FOLDER": str(folder),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
    }
    pool = ThreadPoolExecutor(2)
    runs = []
    for rank in range(2):
        environment = {**common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        begin = partial(set_environment, environment)
        arguments = (str(folder), str(steps))
        runs.append(
            pool.submit(run_program, folder / "train.py", *arguments, folder=folder, warn="ignore", before=begin)
        )
    pool.shutdown(wait=False)
    return runs


def set_environment(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def outcome(runs: list[Future[subprocess.CompletedProcess[str]]]) -> list[str]:
    results = [run.result() for run in runs]
    for done in results:
        assert done.returncode == 0, done.stderr
    return [done.stdout for done in results]


@pytest.mark.slow
def test_a_job_that_is_requeued_goes_on_from_a_checkpoint_committed_before(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(PROGRAM))
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(SCONTROL)
    scontrol.chmod(0o755)

    runs = train(tmp_path, steps=4)
    deadline = time.monotonic() + 60
    notes = [tmp_path / f"in-step-2-{rank}" for rank in range(2)]
    while not all(note.exists() and note.read_text() for note in notes):
        assert not any(run.done() for run in runs), outcome(runs)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # One rank is signalled, in the midst of a step in which both communicate.
    os.kill(int(notes[1].read_text()), signal.SIGUSR1)
    (tmp_path / "go").touch()
    outcome(runs)
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4711 hpc_ckpt_1.ckpt/.metadata\n"

    # What a kill has left of a further one is no checkpoint, although Lightning takes the highest number.
    (tmp_path / "hpc_ckpt_2.ckpt").mkdir()
    for entry in (tmp_path / "hpc_ckpt_1.ckpt").glob("*.distcp"):
        (tmp_path / "hpc_ckpt_2.ckpt" / entry.name).touch()
    for step in (1, 2, 3, 4):
        assert is_committed(tmp_path / f"step-{step}.ckpt")
        shutil.rmtree(tmp_path / f"step-{step}.ckpt")
    for output in outcome(train(tmp_path, steps=5)):
        assert output.split("\n")[:2] == ["step 3", "step 4"]
    assert not (tmp_path / "hpc_ckpt_2.ckpt").exists()


def resume_after_a_kill_in_the_save_before_the_requeue(folder: Path, killed: Path) -> list[list[int]]:
    def callback() -> ModelCheckpoint:
        return ModelCheckpoint(filename="{step}", every_n_train_steps=2, save_top_k=-1)

    fit("dcp", devices=1, steps=2, save_to=folder / "hpc_ckpt_1.ckpt")
    steps = []
    for last in (4, 5):
        killed.mkdir()
        module = fit("dcp", devices=1, steps=last, resume=killed, callbacks=[callback()], default_root_dir=folder)
        steps.append(sorted(module.losses))
    return steps


def test_a_save_killed_before_the_requeue_leaves_what_the_callbacks_saved_to_go_on_from(tmp_path: Path) -> None:
    [steps] = run_ranks(1, resume_after_a_kill_in_the_save_before_the_requeue, tmp_path, tmp_path / "hpc_ckpt_2.ckpt")
    # At first there is but an earlier one beside it.
    assert steps == [[2, 3], [4]]
    assert not (tmp_path / "hpc_ckpt_2.ckpt").exists()
