"""Starting ``lightning_train.py`` as a process of its own, following what it reports, and killing it in mid-save."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

TRAIN = Path(__file__).with_name("lightning_train.py")
RUN_SECONDS = 300  # a run that takes longer hangs
DATA_SECONDS = 10  # until a save has begun to write

Event = dict[str, Any]


@dataclass
class Run:
    """What one run of the training script reported."""

    name: str
    ranks: int
    losses: dict[int, float] = field(default_factory=dict)
    loaded: dict[str, str] = field(default_factory=dict)
    """Digest of the live state when training began."""
    states: dict[int, dict[str, str]] = field(default_factory=dict)
    """Digests of the live state at the saves, by step."""

    def note(self, event: Event) -> None:
        step = event["step"]
        if event["event"] == "started":
            self.loaded = event["state"]
        elif event["event"] == "step":
            self.losses[step] = event["loss"]
        elif event["event"] == "saving":
            self.states[step] = event["state"]


def train(
    run: Run, options: list[str], directory: Path, log: Path, show: Callable[[Event], None], kill_at: int | None = None
) -> None:
    """Train; with ``kill_at``, kill every process in the middle of that step's save.

    Args:
        run: Takes note of what happens.
        options: For the training script.
        directory: Where it keeps its checkpoints.
        log: Where its output goes.
        show: Called with each event.
        kill_at: A step that is saved.
    """
    command = [sys.executable, str(TRAIN), "--dir", str(directory), "--devices", str(run.ranks), *options]
    # The order in which numbers are summed depends on the number of threads, so that is the same in each run.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [*command, "--record", f"/dev/fd/{writing}"],
        env=environment,
        pass_fds=[writing],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that one signal reaches the ranks that Lightning starts, too
    )
    os.close(writing)
    assert process.stdout is not None
    logger = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
    logger.start()
    alarm = threading.Timer(RUN_SECONDS, _kill_group, [process.pid])
    alarm.start()
    killed = False
    try:
        with os.fdopen(reading) as events:
            for line in events:
                event = json.loads(line)
                run.note(event)
                show(event)
                if event["event"] == "saving" and event["step"] == kill_at:
                    _await_data(directory / f"step={kill_at}.ckpt")
                    _kill_group(process.pid)
                    killed = True
                    break
        code = process.wait()
        logger.join()  # ends when the last rank is gone: none of them writes any more
    finally:
        alarm.cancel()
        if process.poll() is None:
            _kill_group(process.pid)
    if code != 0 and not killed:
        print("\n".join(log.read_text().splitlines()[-30:]), file=sys.stderr)
        sys.exit(f"\nThe run '{run.name}' failed with exit code {code}; its output is in {log}")


def _copy(source: IO[bytes], log: Path) -> None:
    with log.open("wb") as target:
        for line in source:
            target.write(line)
            target.flush()


def _await_data(checkpoint: Path) -> None:
    """Return when a data file is being written into the checkpoint."""
    deadline = time.monotonic() + DATA_SECONDS
    while not list(checkpoint.glob("*.distcp")) and time.monotonic() < deadline:
        time.sleep(0.0005)


def _kill_group(process_id: int) -> None:
    try:
        os.killpg(process_id, signal.SIGKILL)
    except ProcessLookupError:
        print("(all ranks had ended before they could be killed)", file=sys.stderr)
