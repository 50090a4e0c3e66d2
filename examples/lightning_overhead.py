"""What saving costs a run: the same steps with and without checkpoints, in turn, timed side by side.

    python examples/lightning_overhead.py                            # in the background
    python examples/lightning_overhead.py --strategy dcp_fsdp2       # while training waits

It trains the model of ``lightning_train.py`` on one rank with one thread, so that a machine with two cores has one to
spare for the background. Times are those of ``fit`` from the first step on, including the wait for the last save.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_train import GLOBAL_BATCH, LanguageModel, Sources


class Stopwatch(Callback):
    """Notes when training begins."""

    started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.perf_counter()


def fit(options: argparse.Namespace, folder: Path, steps: int, *, saves: bool) -> float:
    """Train, and return the seconds it took from the first step on."""
    stopwatch = Stopwatch()
    callbacks: list[Callback] = [stopwatch]
    if saves:
        callbacks.append(
            ModelCheckpoint(folder, "{step}", monitor="step", mode="max", every_n_train_steps=options.every)
        )
    trainer = pl.Trainer(
        strategy=options.strategy,
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        enable_checkpointing=saves,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    model = LanguageModel(options.width, options.depth, options.length, steps)
    trainer.fit(model, Sources(0, GLOBAL_BATCH // options.batch, options.length))
    return time.perf_counter() - stopwatch.started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="dcp_fsdp2_async", help="with _async: in the background")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a step: 1, 2, 4 or 8")
    parser.add_argument("--rounds", type=int, default=1, help="of each kind; medians are printed")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="bytes of context")
    options = parser.parse_args()

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|exists and is not empty|dirpath has).*")
    # Lightning sets the number of threads itself, unless it finds this.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    without, with_saves = [], []
    with tempfile.TemporaryDirectory(prefix="dcp_overhead_") as folder:
        pl.seed_everything(1234, verbose=False)
        fit(options, Path(folder, "warm-up"), 2, saves=False)
        for number in range(options.rounds):
            without.append(fit(options, Path(folder), options.steps, saves=False))
            with_saves.append(fit(options, Path(folder, str(number)), options.steps, saves=True))
    base, other = statistics.median(without), statistics.median(with_saves)
    print(
        f"{options.steps} steps without a save: {base:.2f} s; with a save every {options.every}"
        f" ({options.strategy}): {other:.2f} s, {100 * (other / base - 1):+.1f} %"
    )


if __name__ == "__main__":
    main()
