"""The demo: a run that is killed goes on as if it had not been, on as many ranks as you like. ``make demo`` runs it.

It trains ``lightning_train.py`` (a small GPT on 2 ranks of the CPU that saves in the background) without interruption;
once more, killing all of its processes in the middle of a save; and then from the last committed checkpoint on 2, on 1
and on 4 ranks. Losses are compared with the uninterrupted run's, and the state after each load, bit by bit, with the
one that was saved. And it times what the saves cost.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lightning_recorder import digest
from lightning_runs import TRAIN, Event, Run, train

import dcp_plugins as dcp
from dcp_plugins.lightning import DCPCheckpointIO, is_committed, last_checkpoint

OVERHEAD = Path(__file__).with_name("lightning_overhead.py")
TOLERANCE = 1e-4  # of losses of another number of ranks: sums in another order, carried on over the steps


class Demo:
    """The runs of one demonstration, and where they keep what."""

    def __init__(self, out: Path, strategy: str, steps: int, every: int, model: list[str]) -> None:
        self.out = out
        self.strategy = strategy
        self.steps = steps
        self.every = every
        self.model = model
        self.failures: list[str] = []
        self.started = time.monotonic()

    def run(
        self, name: str, ranks: int, directory: Path, *, resume: Path | None = None, kill_at: int | None = None
    ) -> Run:
        """Train, showing progress; with ``kill_at``, kill every process in the middle of that step's save."""
        run = Run(name, ranks)
        options = ["--strategy", self.strategy, "--steps", str(self.steps), "--every", str(self.every), *self.model]
        options += [] if resume is None else ["--resume", str(resume)]
        log = self.out / f"{name.replace(' ', '-')}.log"
        train(run, options, directory, log, lambda event: self.show(run, event), kill_at)
        return run

    def show(self, run: Run, event: Event) -> None:
        """Print the events that tell of progress."""
        step = event["step"]
        if event["event"] == "started":
            self.say(f"  {run.name}: training on {run.ranks} rank(s) from step {step}")
        elif event["event"] == "step" and (step % self.every == 0 or step == self.steps):
            self.say(f"  {run.name}: step {step:3} of {self.steps}, loss {event['loss']:.4f}")

    def time_saves(self, steps: int, every: int, rounds: int) -> None:
        """Time runs with saves, and runs without."""
        command = [sys.executable, str(OVERHEAD), "--steps", str(steps), "--every", str(every), *self.model]
        command += ["--rounds", str(rounds)]
        done = subprocess.run([*command, "--strategy", self.strategy], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{done.stderr}\nTiming the saves failed with exit code {done.returncode}")
        self.say(f"  {done.stdout.strip()}")

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:5.1f} s] {text}", flush=True)

    def check(self, claim: str, holds: bool, detail: str = "") -> None:
        print(f"  {'ok  ' if holds else 'FAIL'} {claim}{': ' + detail if detail else ''}", flush=True)
        if not holds:
            self.failures.append(claim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="steps of the whole run (default 30)")
    parser.add_argument(
        "--strategy", default="dcp_fsdp2_async", help="dcp_fsdp2, dcp_fsdp or dcp_ddp, with or without _async"
    )
    parser.add_argument("--out", type=Path, help="where checkpoints and logs go; a new temporary directory by default")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 8 steps, nothing on 4 ranks, no timing")
    options = parser.parse_args()
    steps = 8 if options.quick else options.steps
    if steps < 4:
        parser.error("--steps must be at least 4: there is nothing to kill in the middle of")
    every = max(1, steps // 6)
    out = (options.out or Path(tempfile.mkdtemp(prefix="dcp_demo_"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    interrupted = out / "interrupted"
    if interrupted.exists():
        parser.error(f"{interrupted} exists already: choose another --out")
    model = ["--width", "64", "--depth", "2", "--length", "32"] if options.quick else []
    demo = Demo(out, options.strategy, steps, every, model)

    demo.say(f"Checkpoints and logs are in {out}")
    demo.say(f"1. Train for {steps} steps on 2 ranks with strategy='{demo.strategy}', uninterrupted")
    reference = demo.run("uninterrupted", 2, out / "uninterrupted")

    kill_at = every * max(2, round(0.6 * steps / every))
    demo.say(f"2. Train again, and send SIGKILL to all ranks as they save step {kill_at}")
    demo.run("killed", 2, interrupted, kill_at=kill_at)
    checkpoint = last_checkpoint(interrupted)
    if checkpoint is None:
        sys.exit(f"\nFAIL: no committed checkpoint in {interrupted}")
    for entry in sorted(interrupted.iterdir()):
        litter = ", ".join(sorted(file.name for file in entry.iterdir())) or "nothing"
        demo.say(f"  {entry.name}: {'committed' if is_committed(entry) else f'not a checkpoint, holds {litter}'}")
    demo.say(f"  the last committed checkpoint is {checkpoint.name}")

    resumed = []
    for number, ranks in enumerate((2, 1) if options.quick else (2, 1, 4), start=3):
        name = f"resumed on {ranks}"
        demo.say(f"{number}. Resume from {checkpoint.name} on {ranks} rank(s)")
        # The run on 2 ranks goes on where the killed one was; the others leave that directory alone.
        directory = interrupted if ranks == 2 else out / name.replace(" ", "-")
        resumed.append(demo.run(name, ranks, directory, resume=checkpoint))
    if not options.quick:
        demo.say(f"{3 + len(resumed)}. Time what saves cost on one rank with strategy='{demo.strategy}' (two minutes)")
        demo.time_saves(100, 10, 3)
    compare(demo, checkpoint, reference, resumed)
    finish(demo, checkpoint)


def compare(demo: Demo, checkpoint: Path, reference: Run, resumed: list[Run]) -> None:
    """Print the losses side by side, and check losses and states."""
    print(f"\nLosses, resumed from {checkpoint.name}, against the uninterrupted run on 2 ranks")
    print(f"  {'step':>4}  {'uninterrupted':>13}" + "".join(f"  {run.name:>12} {'difference':>10}" for run in resumed))
    steps = sorted(resumed[0].losses)
    for step in steps:
        cells = ""
        for run in resumed:
            loss = run.losses.get(step, float("nan"))
            difference = loss - reference.losses[step]
            cells += f"  {loss:12.8f} {'identical' if difference == 0 else f'{difference:+.1e}':>10}"
        print(f"  {step:4}  {reference.losses[step]:13.8f}{cells}")

    print("\nLosses")
    demo.check(
        "the resumed runs trained all the steps that were left",
        all(sorted(run.losses) == steps for run in resumed) and bool(steps) and steps[-1] == demo.steps,
    )
    for run in resumed:
        differences = [abs(run.losses.get(step, float("nan")) - reference.losses[step]) for step in steps]
        if run.ranks == reference.ranks:
            demo.check(f"on {run.ranks} ranks every loss is identical, bit for bit", not any(differences))
        else:
            bounds = [TOLERANCE * reference.losses[step] for step in steps]
            within = all(found <= bound for found, bound in zip(differences, bounds, strict=True))
            demo.check(
                f"on {run.ranks} rank(s) losses differ by rounding only", within, f"at most {max(differences):.1e}"
            )

    print("\nStates, model and optimizer, compared bit for bit")
    saved = dcp.load_from_keys(["state_dict", "optimizer_0"], checkpoint_id=checkpoint)
    on_disk = digest(saved["state_dict"], [saved["optimizer_0"]])
    global_step = DCPCheckpointIO().load_checkpoint(checkpoint)["global_step"]
    live = reference.states[global_step]
    tensors = sum(" " in value and "(" in value for value in on_disk.values())
    same: Callable[[dict[str, str]], bool] = on_disk.__eq__
    demo.check(
        f"what is on disk is what the uninterrupted run had in memory at step {global_step}",
        same(live),
        f"{tensors} tensors",
    )
    for run in resumed:
        demo.check(f"what {run.ranks} rank(s) had in memory after the load is what is on disk", same(run.loaded))


def finish(demo: Demo, checkpoint: Path) -> None:
    """Say how it went and what to do next; ends the process."""
    if demo.failures:
        sys.exit(f"\n{len(demo.failures)} comparison(s) failed; the runs' output is in {demo.out}/*.log")
    again = [sys.executable, str(TRAIN), "--dir", str(checkpoint.parent), "--steps", str(demo.steps + 20), *demo.model]
    bench = [sys.executable, "-m", "dcp_plugins.cli", "bench", "--help"]
    print(
        f"\nAll comparisons hold, after {time.monotonic() - demo.started:.0f} s."
        f"\n\nThe checkpoints are in {checkpoint.parent}. What to try next:"
        f"\n  train on, on 4 ranks:    {shlex.join([*again, '--resume', '--devices', '4'])}"
        f"\n  train on under FSDP1:    {shlex.join([*again, '--resume', '--strategy', 'dcp_fsdp_async'])}"
        f"\n  measure your storage:    {shlex.join(bench)}"
        f"\n  in your own trainer:     import dcp_plugins.lightning; Trainer(strategy='{demo.strategy}', ...)"
    )


if __name__ == "__main__":
    main()
